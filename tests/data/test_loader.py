"""Slots become batches: the same whatever the number of workers, and a bad sample is named where training can say so.

The reference reads the shards with webdataset and pads by hand.
"""

import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import demo_task
import pytest
import torch
import webdataset
from conftest import write_tiny_shards
from PIL import Image

from trainer.data.index import open_index
from trainer.data.loader import OPEN_SHARDS, ShardDataset, batches
from trainer.data.order import FILLER, Geometry, Order, Slot, micro_batches
from trainer.data.samples import Batch, Turn
from trainer.data.template import ChatTemplate
from trainer.data.transform import ImageTransform
from trainer.data.writer import ShardWriter
from trainer.errors import DataError
from trainer.models.tokenization_qwen import IMAGE_PLACEHOLDER, build_tokenizer

P = 4
"""Tokens of an image."""

S = 16
"""Pixels a side."""

IGNORED = -100


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> ChatTemplate:
    file = tmp_path_factory.mktemp("vocabulary") / "qwen.tiktoken"
    demo_task.write_vocabulary(file, seed=0)
    tokenizer = build_tokenizer(file)
    return ChatTemplate(tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER), P)


@pytest.fixture(scope="module")
def tiny_shards(tmp_path_factory) -> list[Path]:
    """Shards of 7, 5, 1 and 11 samples with one picture, two or none."""
    folder = tmp_path_factory.mktemp("tiny") / "shards"
    write_tiny_shards(folder)
    return sorted(folder.glob("*.tar"))


def dataset_of(shards: list[Path], template: ChatTemplate, max_length: int = 200, **options) -> ShardDataset:
    transform = options.pop("transform", ImageTransform(S))
    return ShardDataset([open_index(shard) for shard in shards], template, transform, max_length, **options)


def one_shard(folder: Path, samples: dict[str, dict]) -> list[Path]:
    with ShardWriter(folder) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return writer.shards


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (S, S), colour).save(buffer, "PNG")
    return buffer.getvalue()


def llava(question: str = "What is it?", answer: str = "A cat.") -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def decoded(template: ChatTemplate, batch: Batch) -> list[str]:
    """Text of each row, the padding included."""
    return template.tokenizer.batch_decode(batch["input_ids"])


def assert_equal(batch: Batch, expected: Batch) -> None:
    assert set(batch) == set(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert batch[name].dtype == value.dtype
            assert torch.equal(batch[name], value), name
        else:
            assert batch[name] == value, name


# --- What a batch holds ---


def by_hand(samples: list[dict], template: ChatTemplate) -> Batch:
    """The batch of webdataset's samples."""
    rows, pixels = [], []
    for sample in samples:
        speakers = {"human": "user", "gpt": "assistant"}
        turns = json.loads(sample["json"])["conversations"]
        rows.append(template.encode([Turn(speakers[turn["from"]], turn["value"]) for turn in turns]))
        for name in ("png", "0.png", "1.png"):
            if name in sample:
                pixels.append(ImageTransform(S)(sample[name]))
    width = max(len(ids) for ids, _ in rows)
    pad = template.tokenizer.pad_token_id
    return Batch(
        input_ids=torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        labels=torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
        pixel_values=torch.stack(pixels) if pixels else torch.empty(0, 3, S, S, dtype=torch.uint8),
        keys=[sample["__key__"] for sample in samples],
        tokens=sum(len(ids) for ids, _ in rows),
        truncated_tokens=0,
    )


def test_batches_are_those_made_by_hand(tiny_shards, template):
    # 24 samples, 4 a batch, in the given order.
    dataset = dataset_of(tiny_shards, template)
    order = Order([len(shard) for shard in dataset.shards], seed=None)
    assert order.epoch_size == 24
    found = list(batches(dataset, micro_batches(order, Geometry(4, 4), 0, 6), num_workers=0))
    samples = list(webdataset.WebDataset([str(shard) for shard in tiny_shards], shardshuffle=False))
    assert len(found) == 6
    for i, batch in enumerate(found):
        assert_equal(batch, by_hand(samples[4 * i : 4 * (i + 1)], template))
    # Pictures of the samples in a shard are 1, 2, 1, 0, 1, 2, ...: 8 in 7 samples, 5 in 5, 1 in 1, 12 in 11.
    assert sum(len(batch["pixel_values"]) for batch in found) == 8 + 5 + 1 + 12


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_are_the_same_for_any_number_of_workers(tiny_shards, template, num_workers):
    # Two epochs and their fillers: ceil(48 / 5) = 10 batches of 5. (torch warns where workers outnumber the cores.)
    dataset = dataset_of(tiny_shards, template)
    order = Order([len(shard) for shard in dataset.shards], seed=1, end=48)
    expected = list(batches(dataset, micro_batches(order, Geometry(5, 5), 0, 10), num_workers=0))
    found = list(batches(dataset, micro_batches(order, Geometry(5, 5), 0, 10), num_workers))
    assert len(found) == len(expected) == 10
    for batch, reference in zip(found, expected, strict=True):
        assert_equal(batch, reference)
    # Every sample once an epoch, and as the order has them.
    keys = [key for batch in found for key in batch["keys"]]
    assert keys == [dataset.key(order.slot(position)) for position in range(48)]
    assert len(set(keys[:24])) == len(set(keys[24:])) == 24


def test_fillers_supervise_nothing(tiny_shards, template):
    dataset = dataset_of(tiny_shards, template)
    slots = [Slot(0, 0), FILLER, Slot(0, 1), FILLER]
    [batch] = batches(dataset, [slots], num_workers=0)
    [alone] = batches(dataset, [[Slot(0, 0), Slot(0, 1)]], num_workers=0)
    assert len(batch["input_ids"]) == 4  # the shape is kept
    assert (batch["labels"][[1, 3]] == IGNORED).all()
    assert torch.equal(batch["labels"][[0, 2]], alone["labels"])
    assert torch.equal(batch["input_ids"][[0, 2]], alone["input_ids"])
    # They bring no picture and no key, and count for nothing.
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])
    for count in ("keys", "tokens", "truncated_tokens"):
        assert batch[count] == alone[count]


def test_a_batch_may_be_fillers_alone(tiny_shards, template):
    # As on the last ranks of an epoch's last step: they still run the model, on one token a row.
    [batch] = batches(dataset_of(tiny_shards, template), [[FILLER, FILLER]], num_workers=0)
    assert batch["input_ids"].shape == (2, 1)
    assert (batch["labels"] == IGNORED).all()
    assert batch["pixel_values"].shape == (0, 3, S, S)
    assert (batch["keys"], batch["tokens"], batch["truncated_tokens"]) == ([], 0, 0)


def test_cut_tokens_are_counted(tmp_path, template):
    answer = "A red circle at the top left. " * 20
    dataset = dataset_of(one_shard(tmp_path, {"a": {"json": llava("Q?", answer)}}), template, max_length=40)
    [batch] = batches(dataset, [[Slot(0, 0)]], num_workers=0)
    whole, _ = template.encode([Turn("user", "Q?"), Turn("assistant", answer)])
    assert batch["input_ids"].tolist() == [whole[:40]]
    assert batch["tokens"] == 40
    assert batch["truncated_tokens"] == len(whole) - 40 > 0


def test_images_follow_the_reading_order(tmp_path, template):
    # The model fills runs in reading order: rows first, marks of a row next.
    colours = ["red", "lime", "blue", "white", "black"]
    samples = {
        "a": {"0.png": picture(colours[0]), "1.png": picture(colours[1]), "json": llava("<image> or <image>?")},
        "b": {"json": llava()},
        "c": {f"{i}.png": picture(colours[2 + i]) for i in range(3)} | {"json": llava("<image><image><image>?")},
    }
    dataset = dataset_of(one_shard(tmp_path, samples), template)
    [batch] = batches(dataset, [[Slot(0, 0), Slot(0, 1), Slot(0, 2)]], num_workers=0)
    found = [tuple(pixels[:, 0, 0].tolist()) for pixels in batch["pixel_values"]]
    assert found == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    image = template.image_run[0]
    assert (batch["input_ids"] == image).sum(1).tolist() == [2 * P, 0, 3 * P]


# --- Samples of every form ---


def text_of(samples: dict[str, dict], folder: Path, template: ChatTemplate, **options) -> list[str]:
    dataset = dataset_of(one_shard(folder, samples), template, **options)
    return [decoded(template, batch)[0] for batch in batches(dataset, [[Slot(0, i)] for i in range(len(samples))], 0)]


IMAGE = IMAGE_PLACEHOLDER * P


@pytest.mark.parametrize(
    "members",
    [
        {"txt": "A cat.\n"},
        # img2dataset: the caption in both, beside much else; or in the text alone.
        {"txt": "A cat.", "json": {"url": "https://example.org/1.jpg", "caption": "A cat.", "width": 9, "sha256": "0"}},
        {"txt": "A cat.", "json": {"url": "https://example.org/1.jpg", "width": 9, "exif": "{}"}},
        {"json": {"caption": "A cat."}},
    ],
    ids=["txt", "both", "txt beside json", "json"],
)
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "jpeg"])
def test_a_caption_answers_the_caption_prompt(tmp_path, template, members, extension):
    buffer = io.BytesIO()
    Image.new("RGB", (S, S)).save(buffer, {"jpg": "JPEG"}.get(extension, extension.upper()))
    samples = {"000000001": {extension: buffer.getvalue(), **members}}
    [text] = text_of(samples, tmp_path, template, caption_prompt="What is seen?")
    assert text == (f"<|im_start|>user\n{IMAGE}\nWhat is seen?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n")


def test_a_system_prompt_stands_before_conversations_without_one(tmp_path, template):
    own = {"conversations": [{"from": "system", "value": "Own."}, *llava()["conversations"]]}
    samples = {"a": {"json": llava()}, "b": {"json": own}}
    rest = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    assert text_of(samples, tmp_path, template, system_prompt="Be brief.") == [
        f"<|im_start|>system\nBe brief.<|im_end|>\n{rest}",
        f"<|im_start|>system\nOwn.<|im_end|>\n{rest}",
    ]


# --- Bad samples ---

BAD = {
    "picture": ({"png": b"no picture", "json": llava()}, "the picture cannot be decoded"),
    "cut picture": ({"png": picture()[:50], "json": llava()}, "the picture cannot be decoded"),
    "not JSON": ({"json": b"{'conversations': []}"}, r"its \.json is not JSON"),
    "not text": ({"json": b'{"caption": "\xff"}'}, r"its \.json is not JSON"),
    "JSON list": ({"json": b"[]"}, r"its \.json holds a list where an object is expected"),
    "no conversation": ({"json": {"label": 3}}, r"the fields are \['label'\]"),
    "empty caption": ({"png": picture(), "txt": " \n"}, "no answer to learn from"),
    "marks": ({"png": picture(), "json": llava("<image><image>")}, "2 image marks .* but 1 images"),
    "half a character": ({"json": b'{"caption": "\\ud83d"}'}, "a lone surrogate"),
    "too many images": (
        {f"{i}.png": picture() for i in range(60)} | {"json": llava("<image>" * 60)},
        "images reach to token .* beyond data.max_length=200",
    ),
    "long question": ({"json": llava("Why? " * 200)}, "no token of an answer is left"),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("members", "message"), BAD.values(), ids=BAD)
def test_a_bad_sample_is_named_in_the_training_process(tmp_path, template, members, message, num_workers):
    samples = {"good": {"json": llava()}, "bad": members, "also good": {"json": llava()}}
    shards = one_shard(tmp_path, samples)
    loader = batches(dataset_of(shards, template), [[Slot(0, 0)], [Slot(0, 2), Slot(0, 1)]], num_workers)
    assert next(loader)["keys"] == ["good"]  # what comes before is not lost
    with pytest.raises(DataError, match=rf"^{re.escape(str(shards[0]))}: sample 'bad': .*{message}") as error:
        next(loader)
    assert type(error.value) is DataError
    # One line: torch would hand on a worker's traceback as text.
    assert "Traceback" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_shard_that_was_cut_or_removed_is_named(tmp_path, template):
    shards = one_shard(tmp_path, {key: {"json": llava(answer=f"{key} " * 5000)} for key in "ab"})
    dataset = dataset_of(shards, template)  # indexed while it was whole
    with shards[0].open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    [batch] = batches(dataset, [[Slot(0, 0)]], num_workers=0)
    assert batch["keys"] == ["a"]
    with pytest.raises(
        DataError, match=r"sample 'b': expected \d+ bytes at offset \d+, found \d+: the shard has changed"
    ):
        next(batches(dataset, [[Slot(0, 1)]], num_workers=0))
    shards[0].unlink()
    fresh = ShardDataset(dataset.shards, template, ImageTransform(S), 200)
    with pytest.raises(DataError, match=r"sample 'a': the shard cannot be read \(No such file"):
        next(batches(fresh, [[Slot(0, 0)]], num_workers=0))


# --- Processes and files ---


@dataclass(frozen=True)
class NotingTransform(ImageTransform):
    """The transform, and a note of the process that ran it."""

    notes: Path = Path()

    def __call__(self, encoded: bytes) -> torch.Tensor:
        with self.notes.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return super().__call__(encoded)


def open_shards() -> int:
    """How many tars this process holds open."""
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).endswith(".tar") for link in links if os.path.islink(link))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_read_and_decode_and_the_training_process_does_not(tiny_shards, template, tmp_path, num_workers):
    before = open_shards()
    dataset = dataset_of(tiny_shards, template, transform=NotingTransform(S, notes=tmp_path / "notes"))
    slots = [[Slot(3, i), Slot(0, i % 7)] for i in range(11)]
    pictures = sum(len(batch["pixel_values"]) for batch in batches(dataset, slots, num_workers))
    processes = [int(line) for line in (tmp_path / "notes").read_text().split()]
    assert len(processes) == pictures > 0
    if num_workers:
        assert len(set(processes)) == num_workers
        assert os.getpid() not in processes
        assert open_shards() == before
    else:
        assert set(processes) == {os.getpid()}
        assert open_shards() == before + 2  # so an open shard would have shown above


def test_open_files_do_not_grow_with_the_shards(tmp_path, template):
    # Large data sets have thousands of shards, and a process may usually open 1,024 files.
    with ShardWriter(tmp_path, samples_per_shard=1) as writer:
        for i in range(3 * OPEN_SHARDS):
            writer.write(f"{i}", {"txt": f"Caption {i}."})
    dataset, before = dataset_of(writer.shards, template), open_shards()
    most = 0
    for _ in range(2):  # the second time, every file has to be opened again
        for i in range(3 * OPEN_SHARDS):
            assert dataset.read(Slot(i, 0)).conversation[-1].text == f"Caption {i}."
            most = max(most, open_shards() - before)
    assert most == OPEN_SHARDS < 100
