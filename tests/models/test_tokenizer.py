"""The fast tokenizer against the original one: texts, ids and ChatML prompts in shared/golden/tokenizer_cases.json.

All of it holds for the tokenizer as built from qwen.tiktoken, and again for the one that opens a saved folder.
"""

import base64
import json

import pytest
from reference import shared
from transformers import AutoTokenizer

from trainer.models.tokenization_qwen import build_tokenizer


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(shared("golden/tokenizer_cases.json").read_text())


@pytest.fixture(scope="module")
def built():
    return build_tokenizer(shared("qwen/qwen.tiktoken"))


@pytest.fixture(scope="module")
def reopened(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    built.save_pretrained(folder)
    assert not list(folder.glob("*.py"))
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@pytest.fixture(scope="module", params=["built", "reopened"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def conversation(chat: dict) -> list[dict[str, str]]:
    turns = [("system", chat["system"])]
    for question, answer in chat["history"]:
        turns += [("user", question), ("assistant", answer)]
    return [{"role": role, "content": text} for role, text in [*turns, ("user", chat["query"])]]


def test_texts_become_the_original_ids(tokenizer, golden):
    assert golden["texts"]
    ids = [tokenizer.encode(case["text"], add_special_tokens=False) for case in golden["texts"]]
    assert ids == [case["ids"] for case in golden["texts"]]


def test_a_batch_gives_the_ids_of_each_text(tokenizer, golden):
    texts = [case["text"] for case in golden["texts"]]
    assert tokenizer(texts)["input_ids"] == [case["ids"] for case in golden["texts"]]


def test_ids_become_the_original_texts(tokenizer, golden):
    texts = [tokenizer.decode(case["ids"]) for case in golden["texts"]]
    assert texts == [case["decoded"] for case in golden["texts"]]


def test_chat_template_writes_the_original_prompt(tokenizer, golden):
    assert golden["chats"]
    for chat in golden["chats"]:
        prompt = tokenizer.apply_chat_template(conversation(chat), tokenize=False, add_generation_prompt=True)
        assert prompt == chat["raw"]


def test_chats_encoded_in_pieces_become_the_original_ids(tokenizer, golden):
    # The original encodes roles and texts as plain text: `<|extra_0|>` in a user's words is seven tokens, not one.
    # Control tokens and line breaks stand between the pieces.
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def plain(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    for chat in golden["chats"]:
        ids = []
        for message in conversation(chat):
            ids += [start, *plain(message["role"]), *plain("\n"), *plain(message["content"]), end, *plain("\n")]
        ids += [start, *plain("assistant"), *plain("\n")]
        assert ids == chat["ids"]
        assert tokenizer.decode(ids) == chat["raw"]


def test_a_message_of_parts_marks_its_images_on_lines_of_their_own(tokenizer):
    parts = [{"type": "image"}, {"type": "text", "text": "Which is larger?"}, {"type": "image"}]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert prompt == "<|im_start|>user\n<|extra_0|>\nWhich is larger?\n<|extra_0|><|im_end|>\n"
    assert tokenizer.encode(prompt).count(151646) == 2


def test_control_tokens_have_the_original_ids(tokenizer):
    # 151,643 ranks (0 to 151,642), then 3 + 205 control tokens: 151,851 in all.
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    assert tokenizer.convert_tokens_to_ids(control) == list(range(151643, 151851))
    assert len(tokenizer) == 151851
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 151643
    assert all(tokenizer.encode(token) == [i] for i, token in enumerate(control, start=151643))


def test_user_text_cannot_become_a_control_token(tokenizer):
    text = "<|im_start|>system<|im_end|><|endoftext|><|extra_0|>"
    ids = tokenizer.encode(text, split_special_tokens=True)
    assert max(ids) < 151643
    assert tokenizer.decode(ids) == text


def test_any_bytes_survive(tokenizer):
    # Byte-level: what no merge covers is spelt in bytes. (The normaliser, NFC, leaves these as they are.)
    for text in ("\x00\x01\x7f", "𓂀𒀀", "a\u200bb", "\t \n \r\n  x", "ÀÉ가각"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# --- Files in a wrong format ---


def tiktoken_lines(count: int = 256) -> list[str]:
    """A valid vocabulary of the single bytes alone."""
    return [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(count)]


def test_a_small_vocabulary_opens(tmp_path):
    # So that the refusals below are for the line that was changed. Control tokens follow the 256 ranks.
    file = tmp_path / "qwen.tiktoken"
    file.write_text("\n".join(tiktoken_lines()) + "\n")
    assert build_tokenizer(file).encode("Hi<|endoftext|>") == [ord("H"), ord("i"), 256]


@pytest.mark.parametrize(
    "line", ["QQ==", "QQ== 40 41", "QQ== forty", "Q?== 40", "<html>", "version https://git-lfs.github.com/spec/v1"]
)
def test_a_malformed_line_is_named(tmp_path, line):
    lines = tiktoken_lines()
    lines[40] = line
    file = tmp_path / "qwen.tiktoken"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"qwen\.tiktoken, line 41: expected 'BASE64 RANK'") as error:
        build_tokenizer(file)
    assert line in str(error.value)


@pytest.mark.parametrize("change", ["a rank twice", "a rank left out", "a line twice"])
def test_ranks_are_each_there_once(tmp_path, change):
    lines = tiktoken_lines()
    if change == "a rank twice":
        lines[40] = lines[40].split()[0] + " 41"
    elif change == "a rank left out":
        del lines[40]
    else:
        lines.append(lines[40].split()[0] + " 256")
    file = tmp_path / "qwen.tiktoken"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="ranks"):
        build_tokenizer(file)
