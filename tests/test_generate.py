"""What an exported model answers: alone or with others, at once or as it grows, from a command line or a file."""

import io
import json
import random
import re
import sys

import demo_task
import pytest
import torch
from ranks import script

from trainer.config import DataConfig
from trainer.data.samples import Turn
from trainer.errors import EXIT_USER_ERROR, BadSample, CheckpointError, ConfigError, DataError, printable
from trainer.generate import Decoding, Generator, TooLong
from trainer.question_files import AnswerFile, answer_all, folder_questions, read_questions

SAMPLED = Decoding(16, temperature=1.0, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def generator(tiny_export) -> Generator:
    return Generator(tiny_export)


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    rng = random.Random(0)
    return [demo_task.draw(demo_task.random_scene(rng), rng) for _ in range(4)]


@pytest.fixture(scope="module")
def prompts(generator, pictures):
    """Of different lengths, with one picture, another, none, and two: their answers all differ."""
    asked = [("What?", pictures[:1]), ("What?", pictures[1:2]), ("Where is the red ring?", []),
             ("Is <image> left of <image> in any way?", pictures[2:])]  # fmt: skip
    return [generator.prompt([Turn("user", text)], images) for text, images in asked]


def by_hand(generator, prompt, count: int) -> list[int]:
    """Greedy token ids from plain forward passes over the whole text so far, without a cache."""
    pixels = generator.transform.normalize(prompt.pixel_values, generator.model.dtype)
    ids = list(prompt.input_ids)
    for _ in range(count):
        with torch.no_grad():
            logits = generator.model(torch.tensor([ids]), pixel_values=pixels, use_cache=False).logits[0, -1]
        logits[generator.model.config.image_token_id] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt.input_ids) :]


def test_cached_answers_are_those_of_plain_forward_passes(generator, prompts):
    answers = generator.answers(prompts, Decoding(12))
    assert len(set(answers)) == len(prompts)
    assert answers == generator.answers(prompts, Decoding(12), use_cache=False)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = by_hand(generator, prompt, 12)
        ends = [i for i, token in enumerate(expected) if token in generator.model.generation_config.eos_token_id]
        expected = expected[: ends[0]] if ends else expected
        assert answer == generator.tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("decoding", [Decoding(16), Decoding(16, num_beams=3)], ids=["greedy", "beams"])
def test_a_batch_of_any_lengths_and_pictures_equals_each_alone(generator, prompts, decoding):
    assert generator.answers(prompts, decoding) == [generator.answers([prompt], decoding)[0] for prompt in prompts]


def test_beams_find_a_likelier_answer_than_greed(generator, prompts):
    def log_probability(answer_ids: list[int], prompt) -> float:
        pixels = generator.transform.normalize(prompt.pixel_values, generator.model.dtype)
        ids = torch.tensor([prompt.input_ids + answer_ids])
        with torch.no_grad():
            scores = generator.model(ids, pixel_values=pixels).logits[0, len(prompt.input_ids) - 1 : -1]
        scores[:, generator.model.config.image_token_id] = -torch.inf
        return scores.log_softmax(-1).gather(1, torch.tensor(answer_ids)[:, None]).sum().item()

    def found(prompt, **settings) -> float:
        # As ids: a text need not give back the tokens it was made of. No end, so that both have as many.
        output = generator.model.generate(
            torch.tensor([prompt.input_ids]), max_new_tokens=8, do_sample=False, eos_token_id=-1, **settings,
            pixel_values=generator.transform.normalize(prompt.pixel_values, generator.model.dtype),
        )  # fmt: skip
        return log_probability(output[0, len(prompt.input_ids) :].tolist(), prompt)

    gains = [found(prompt, num_beams=4) - found(prompt, num_beams=1) for prompt in prompts]
    assert min(gains) > -1e-4
    assert max(gains) > 0.1


def test_drawn_answers_depend_on_the_seed_alone(generator, prompts):
    first = generator.answers(prompts, SAMPLED)
    torch.manual_seed(99)
    assert generator.answers(prompts, SAMPLED) == first
    assert generator.answers(prompts, Decoding(16, temperature=1.0, top_p=0.9, seed=6)) != first
    # Of a share of the probability that the likeliest token has by itself, nothing else can be drawn.
    assert generator.answers(prompts, Decoding(16, temperature=1.0, top_p=1e-6)) == generator.answers(
        prompts, Decoding(16)
    )
    assert generator.answers(prompts, Decoding(8, temperature=1.0, num_beams=2))


@pytest.mark.parametrize("decoding", [Decoding(24), SAMPLED], ids=["greedy", "drawn"])
def test_a_streamed_answer_grows_into_the_one_at_once(generator, prompts, decoding):
    for prompt in prompts:
        texts = list(generator.stream(prompt, decoding))
        assert texts[-1] == generator.answers([prompt], decoding)[0]
        assert len(set(texts)) > 3
        for before, after in zip(texts, texts[1:], strict=False):
            assert after.startswith(before)


def test_a_stream_that_is_closed_ends_the_generation(generator, prompts):
    steps = []
    hook = generator.model.language_model.register_forward_pre_hook(lambda *_: steps.append(1))
    try:
        list(generator.stream(prompts[3], Decoding(200)))
        whole = len(steps)
        steps.clear()
        stream = generator.stream(prompts[3], Decoding(200))
        next(stream)
        stream.close()
    finally:
        hook.remove()
    assert whole > 100
    assert len(steps) < whole / 2


def test_a_failure_while_streaming_reaches_the_reader(generator, prompts):
    with pytest.raises(ValueError, match="streamer.*beam search"):
        list(generator.stream(prompts[0], Decoding(4, num_beams=2)))


def test_pictures_stand_at_their_marks_or_in_front(generator, pictures):
    def ids(text: str, images: list[bytes]) -> list[int]:
        return generator.prompt([Turn("user", text)], images, "").input_ids

    assert ids("What?", pictures[:2]) == ids("<image>\n<image>\nWhat?", pictures[:2])
    assert ids("a <image> b", pictures[:1]) != ids("<image>\na  b", pictures[:1])
    with pytest.raises(BadSample, match="2 image marks '<image>' in the questions, but 1 images"):
        ids("<image><image>", pictures[:1])
    with pytest.raises(BadSample, match="1 image marks '<image>' in the questions, but 0 images"):
        ids("<image>", [])


def test_the_system_prompt_is_that_of_training(tiny_export, tmp_path):
    assert Generator(tiny_export).system_prompt == DataConfig().system_prompt  # the folder does not say
    for file in tiny_export.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "processor_config.json").write_text('{"system_prompt": "你是助手。"}')
    generator = Generator(tmp_path)
    question = [Turn("user", "What?")]
    text = generator.tokenizer.decode(generator.prompt(question, []).input_ids)
    assert (
        text == "<|im_start|>system\n你是助手。<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert generator.tokenizer.decode(generator.prompt(question, [], "").input_ids).startswith("<|im_start|>user")
    own = [Turn("system", "Own."), *question]
    assert generator.tokenizer.decode(generator.prompt(own, []).input_ids).startswith("<|im_start|>system\nOwn.<")


def test_an_answer_ends_where_the_context_does(generator, pictures):
    # seq_length is 256. The prompt of n letters has n + overhead tokens, for "~" is never merged with another.
    overhead = len(generator.prompt([Turn("user", "")], []).input_ids)
    nearly = generator.prompt([Turn("user", "~" * (253 - overhead))], [])
    assert len(nearly.input_ids) == 253
    short = generator.prompt([Turn("user", "What?")], pictures[:1])
    settings = {"eos_token_id": -1}  # neither ends by itself
    long_answer, other = generator.answers([nearly, short], Decoding(20), **settings)
    assert long_answer == generator.answers([nearly], Decoding(3), **settings)[0]
    assert other == generator.answers([short], Decoding(20), **settings)[0]
    with pytest.raises(TooLong, match="the prompt has 256 tokens, pictures included, and the model reads at most 256"):
        generator.prompt([Turn("user", "~" * (256 - overhead))], [])
    with pytest.raises(TooLong, match="has 276 tokens"):  # 4 for each of 5 pictures, and their line ends
        generator.prompt([Turn("user", "~" * (251 - overhead))], pictures[:1] * 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_new_tokens": 0}, "--max-new-tokens 0: must be at least 1"), ({"num_beams": 0}, "--num-beams 0"),
     ({"temperature": -1.0}, "--temperature -1.0"), ({"temperature": float("nan")}, "--temperature nan"),
     ({"top_p": 1.5, "temperature": 1.0}, "--top-p 1.5"), ({"top_p": 0.5}, "give --temperature too")],
)  # fmt: skip
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        Decoding(**settings)


# --- Many questions ---


@pytest.fixture
def questions_file(tmp_path, pictures):
    """Nine lines: six questions, and three that are none."""
    for number, picture in enumerate(pictures):
        (tmp_path / f"{number}.png").write_bytes(picture)
    (tmp_path / "notes.png").write_text("not a picture")
    dialogue = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A ring."},
                {"from": "human", "value": "Where?"}, {"from": "gpt", "value": "never read"}]  # fmt: skip
    lines = [
        {"id": "one", "image": "0.png", "prompt": "What?"},
        {"prompt": "Where is the red ring?"},
        {"id": "two", "images": ["1.png", "2.png"], "prompt": "Is <image> left of <image>?"},
        {"id": "missing", "image": "nowhere.png", "prompt": "What?"},
        {"id": "dialogue", "image": "3.png", "conversations": dialogue},
        {"id": "text", "image": "notes.png", "prompt": "What?"},
        {"id": "other", "image": "1.png", "prompt": "What shape is it?"},
        {"id": "last", "image": "2.png", "prompt": "它在哪里？"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"prompt": \n')
    return file


def answered(generator, file, out, decoding=SAMPLED, stop_after: int = 99) -> list[str]:
    """Answers a file as the command does, or its first batches; what was said of bad lines."""
    bad: list[str] = []
    questions = read_questions(file, file.parent, bad.append)
    answers = AnswerFile(out, questions, file.parent, decoding, "")
    batches = answer_all(generator, questions, decoding, "", 3, answers.done, bad.append)
    for _, batch in zip(range(stop_after), batches, strict=False):
        answers.add(batch)
    answers.out.close()
    return bad


def test_a_job_that_was_stopped_ends_as_one_that_was_not(generator, questions_file, tmp_path):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    bad = answered(generator, questions_file, whole)
    assert [message.removeprefix(f"{questions_file}:").split(": ")[0] for message in bad] == ["9", "4", "6"]
    assert "not JSON" in bad[0]
    assert f"{tmp_path}/nowhere.png: cannot be read (No such file or directory)" in bad[1]
    assert f"{tmp_path}/notes.png: the picture cannot be decoded" in bad[2]

    found = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [line["id"] for line in found] == ["one", 2, "two", "dialogue", "other", "last"]
    assert found[2]["images"] == [f"{tmp_path}/1.png", f"{tmp_path}/2.png"]
    assert found[0]["settings"] == {"system_prompt": "", "max_new_tokens": 16, "temperature": 1.0, "top_p": 0.9,
                                    "num_beams": 1, "seed": 5}  # fmt: skip

    answered(generator, questions_file, stopped, stop_after=2)
    assert len(stopped.read_text().splitlines()) == 4
    content = stopped.read_bytes()
    stopped.write_bytes(content[: content.index(b"\n", content.index(b'"two"')) + 30])  # ended inside a line
    answered(generator, questions_file, stopped)
    assert stopped.read_bytes() == whole.read_bytes()
    answered(generator, questions_file, stopped)
    assert stopped.read_bytes() == whole.read_bytes()


def test_lines_of_a_file_are_answered_as_each_alone(generator, questions_file, pictures, tmp_path):
    out, greedy = tmp_path / "answers.jsonl", Decoding(16)
    answered(generator, questions_file, out, greedy)
    found = {line["id"]: line["answer"] for line in map(json.loads, out.read_text().splitlines())}
    dialogue = [Turn("user", "<image>\nWhat?"), Turn("assistant", "A ring."), Turn("user", "Where?")]
    expected = {
        "one": generator.prompt([Turn("user", "What?")], pictures[:1], ""),
        2: generator.prompt([Turn("user", "Where is the red ring?")], [], ""),
        "two": generator.prompt([Turn("user", "Is <image> left of <image>?")], pictures[1:3], ""),
        "dialogue": generator.prompt(dialogue, pictures[3:], ""),
        "other": generator.prompt([Turn("user", "What shape is it?")], pictures[1:2], ""),
        "last": generator.prompt([Turn("user", "它在哪里？")], pictures[2:3], ""),
    }
    assert found == {name: generator.answers([prompt], greedy)[0] for name, prompt in expected.items()}


def test_a_file_of_other_answers_is_not_gone_on_with(generator, questions_file, tmp_path):
    out = tmp_path / "answers.jsonl"
    answered(generator, questions_file, out, stop_after=1)
    before = out.read_bytes()
    with pytest.raises(
        DataError, match=r"answers.jsonl:1: an answer of another job: its question 'one' differs in set"
    ):
        answered(generator, questions_file, out, Decoding(16))
    for old, new in (("Where is", "Who is"), ('"id": "one"', '"id": "eins"')):
        changed = tmp_path / "changed.jsonl"
        changed.write_text(questions_file.read_text().replace(old, new))
        with pytest.raises(DataError, match=r"answers.jsonl:\d: an answer of another job"):
            answered(generator, changed, out)
    assert out.read_bytes() == before
    with pytest.raises(DataError, match=r"questions.jsonl:1: not an answer .*--out takes a new file"):
        answered(generator, questions_file, questions_file)
    with pytest.raises(DataError, match="cannot be written"):
        answered(generator, questions_file, tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [('["a"]', "expected a JSON object, found list"), ('{"image": "0.png"}', "expected a text 'prompt'"),
     ('{"prompt": " "}', "there is no question to answer"), ('{"prompt": "a", "id": 1.5}', "'id' must be a text"),
     ('{"prompt": "a", "image": 7}', "must be a file name or a list"), ('{"prompt": "\\ud800"}', "half a character"),
     ('{"prompt": "<image>"}', "1 image marks"), ('{"prompt": "a", "id": "x"}', "is that of .*:1 too"),
     ('{"messages": [{"role": "assistant", "content": "a"}]}', "there is no question")],
)  # fmt: skip
def test_lines_that_are_no_question(tmp_path, line, message):
    file, bad = tmp_path / "q.jsonl", []
    file.write_text('{"prompt": "a", "id": "x"}\n\n' + line)
    assert [question.id for question in read_questions(file, tmp_path, bad.append)] == ["x"]
    assert len(bad) == 1
    assert bad[0].startswith(f"{file}:3: ")
    assert re.search(message, bad[0])


def test_a_folder_asks_the_same_of_each_picture_by_name(tmp_path, pictures):
    with pytest.raises(DataError, match="no pictures in this folder"):
        folder_questions(tmp_path, "What?")
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).write_bytes(pictures[0])
    found = folder_questions(tmp_path, "What?")
    assert [(question.id, question.turns[-1].text) for question in found] == [
        ("a.JPG", "<image>\nWhat?"), ("b.png", "<image>\nWhat?"),
    ]  # fmt: skip


# --- The command ---


@pytest.fixture
def ask(tiny_export, monkeypatch, capsys):
    """Runs launch/generate.py's main in this process: its standard output."""
    import generate as launched

    def run(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(tiny_export), *map(str, args)])
        launched.main()
        return capsys.readouterr().out

    return run


def test_one_question_about_several_pictures_or_none(ask, generator, prompts, pictures, tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    first.write_bytes(pictures[2])
    second.write_bytes(pictures[3])
    expected = generator.answers(prompts, Decoding(12))
    said = ask("--image", first, "--image", second, "--prompt", "Is <image> left of <image> in any way?",
               "--max-new-tokens", 12)  # fmt: skip
    assert said == expected[3] + "\n"
    assert ask("--prompt", "Where is the red ring?", "--max-new-tokens", 12) == expected[2] + "\n"
    streamed = ask("--prompt", "Where is the red ring?", "--max-new-tokens", 12, "--stream")
    assert streamed == printable(expected[2], lines=True) + "\n"
    beams = generator.answers(prompts[2:3], Decoding(12, num_beams=3))[0]
    assert ask("--prompt", "Where is the red ring?", "--max-new-tokens", 12, "--num-beams", 3) == beams + "\n"


def test_a_folder_and_a_file_of_questions(ask, generator, questions_file, tmp_path, capsys):
    options = ("--max-new-tokens", 12, "--batch-size", 3)
    lines = [json.loads(line) for line in ask("--image", tmp_path, "--prompt", "What?", *options).splitlines()]
    assert [line["id"] for line in lines] == [f"{number}.png" for number in range(4)]
    out = tmp_path / "answers.jsonl"
    for _ in range(2):  # the second time, all is done
        assert ask("--jsonl", questions_file, "--out", out, *options) == ""
        found = {line["id"]: line["answer"] for line in map(json.loads, out.read_text().splitlines())}
        assert len(found) == 6
    assert found["one"] == lines[0]["answer"]


def test_bad_lines_are_named_and_counted_and_only_all_of_them_are_fatal(ask, questions_file, tmp_path, capsys):
    ask("--jsonl", questions_file, "--out", tmp_path / "answers.jsonl", "--max-new-tokens", 4)
    # `ask` has read what was said; a second file says it again.
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 7}\n{"prompt": "What?", "image": "nowhere.png"}\n')
    with pytest.raises(DataError, match="none of 2 questions can be used"):
        ask("--jsonl", bad)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"left out: {bad}:1: ")
    assert said[1].startswith(f"left out: {bad}:2: {tmp_path}/nowhere.png: cannot be read")


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [("--image {tmp}/nowhere.png --prompt a", DataError, "nowhere.png: no such file"),
     ("--image {tmp}/notes.png --prompt a", DataError, "notes.png: the picture cannot be decoded .*not known"),
     ("--image {tmp}/0.png --prompt <image><image>", DataError, "2 image marks"),
     ("--image {tmp}/0.png", ConfigError, "--prompt is missing"), ("", ConfigError, "--prompt is missing"),
     ("--image {tmp} --image {tmp}/0.png --prompt a", ConfigError, "a folder stands alone"),
     ("--jsonl {tmp}/questions.jsonl --prompt a", ConfigError, "leave --prompt out"),
     ("--jsonl {tmp}/questions.jsonl --image {tmp}/0.png", ConfigError, "only be the folder"),
     ("--jsonl {tmp}/nowhere.jsonl", DataError, "nowhere.jsonl: no such file"),
     ("--prompt a --out {tmp}/x", ConfigError, "--out is for many questions"),
     ("--prompt a --stream --num-beams 2", ConfigError, "without --num-beams"),
     ("--image {tmp} --prompt a --stream", ConfigError, "one question"),
     ("--prompt a --batch-size 0", ConfigError, "--batch-size 0"),
     ("--prompt a --top-p 0.5", ConfigError, "--temperature"),
     ("--prompt {long}", TooLong, r"the prompt has \d+ tokens, .* at most 256"),
     ("--prompt a --model {tmp}", CheckpointError, "neither a model folder"),
     ("--prompt a --model {tmp}/nowhere", CheckpointError, "no such folder"),
     ("--prompt a --model {qwen}", CheckpointError, "of architecture 'qwen', expected an export")],
)  # fmt: skip
def test_mistakes_on_the_command_line(ask, questions_file, tiny_run, tmp_path, args, error, message):
    names = {"tmp": tmp_path, "long": "~" * 300, "qwen": tiny_run.parent / "tiny-qwen"}
    with pytest.raises(error, match=message):
        ask(*args.format(**names).split())


def test_on_a_terminal_the_answer_appears_as_it_grows(ask, generator, prompts, monkeypatch):
    class Terminal(io.StringIO):
        def __init__(self):
            super().__init__()
            self.pieces: list[str] = []

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.pieces.append(text)
            return len(text)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    ask("--prompt", "Where is the red ring?", "--max-new-tokens", 12)
    expected = printable(generator.answers(prompts[2:3], Decoding(12))[0], lines=True)
    assert "".join(terminal.pieces) == expected + "\n"
    assert len([piece for piece in terminal.pieces if piece]) > 3


def test_a_mistake_is_one_message_and_exit_code_2(tmp_path):
    done = script("launch/generate.py", "--model", str(tmp_path), "--prompt", "a", timeout=120)
    assert done.returncode == EXIT_USER_ERROR == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path}: neither a model folder (config.json)")
    assert "Traceback" not in done.stderr


def test_a_file_of_one_line_that_is_no_answer_is_left_as_it_is(tiny_export, tmp_path):
    file = tmp_path / "llava.json"
    file.write_text('[{"id": 1}]')
    with pytest.raises(DataError, match="llava.json: its last line is not an answer"):
        AnswerFile(file, [], tiny_export, Decoding(), "")
    assert file.read_text() == '[{"id": 1}]'
