"""Slots become batches: the same whatever the number of workers, and a bad sample is left out and named.

The reference reads the shards with webdataset and pads by hand.
"""

import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import webdataset
from conftest import write_tiny_shards
from pairs import P, S, dataset_of, documents, make_template, picture, plain_stream, write_pairs
from PIL import Image

from trainer.data.loader import BatchLoader
from trainer.data.order import Geometry, MicroBatch, Row, Slot, micro_batches
from trainer.data.reader import OPEN_SHARDS, ShardReader
from trainer.data.samples import Batch, Rejected, Turn
from trainer.data.template import ChatTemplate
from trainer.data.transform import ImageTransform
from trainer.data.writer import ShardWriter
from trainer.models.tokenization_qwen import IMAGE_PLACEHOLDER

IGNORED = -100


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> ChatTemplate:
    return make_template(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def tiny_shards(tmp_path_factory) -> list[Path]:
    """Shards of 7, 5, 1 and 11 samples with one picture, two or none."""
    folder = tmp_path_factory.mktemp("tiny") / "shards"
    write_tiny_shards(folder)
    return sorted(folder.glob("*.tar"))


def one_shard(folder: Path, samples: dict[str, dict]) -> list[Path]:
    with ShardWriter(folder) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return writer.shards


def llava(question: str = "What is it?", answer: str = "A cat.") -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def micro_batch(*rows: Row) -> MicroBatch:
    return MicroBatch(list(rows), is_last=True)


def one_batch(dataset, *rows: Row) -> Batch:
    [batch] = BatchLoader(dataset, [micro_batch(*rows)], num_workers=0)
    return batch


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
        document_ends=None,
        tokens=sum(len(ids) for ids, _ in rows),
        squares=sum(len(ids) ** 2 for ids, _ in rows),
        truncated_samples=0,
        truncated_tokens=0,
        keys=[sample["__key__"] for sample in samples],
        rejected=[],
        is_last=True,
    )


def test_batches_are_those_made_by_hand(tiny_shards, template):
    # 24 samples, 4 a batch, in the given order.
    dataset = dataset_of(tiny_shards, template)
    stream = plain_stream([len(shard) for shard in dataset.reader.shards], seed=None, end=24)
    found = list(BatchLoader(dataset, micro_batches(stream, Geometry(4, 4), 0, 6), num_workers=0))
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
    stream = plain_stream([len(shard) for shard in dataset.reader.shards], seed=1, end=48)
    expected = list(BatchLoader(dataset, micro_batches(stream, Geometry(5, 5), 0, 10), num_workers=0))
    found = list(BatchLoader(dataset, micro_batches(stream, Geometry(5, 5), 0, 10), num_workers))
    assert len(found) == len(expected) == 10
    for batch, reference in zip(found, expected, strict=True):
        assert_equal(batch, reference)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("num_workers", [0, 3])
def test_samples_come_as_the_order_has_them(tmp_path, template, num_workers):
    sizes = [5, 9, 4]
    tars = [write_pairs(tmp_path / f"s{number}.tar", size) for number, size in enumerate(sizes)]
    dataset, stream = dataset_of(tars, template), plain_stream(sizes, seed=1, end=36)
    loader = BatchLoader(dataset, micro_batches(stream, Geometry(5, 5), 0, 8), num_workers)
    keys = [document.key for batch in loader for document in documents(batch, template)]
    places = [stream.row(position)[0] for position in range(36)]
    assert keys == [f"s{place.shard}-{place.sample}" for place in places]
    assert len(set(keys[:18])) == len(set(keys[18:])) == 18


def test_fillers_supervise_nothing(tiny_shards, template):
    dataset = dataset_of(tiny_shards, template)
    batch = one_batch(dataset, [Slot(0, 0)], [], [Slot(0, 1)], [])
    alone = one_batch(dataset, [Slot(0, 0)], [Slot(0, 1)])
    assert len(batch["input_ids"]) == 4  # the shape is kept
    assert (batch["labels"][[1, 3]] == IGNORED).all()
    assert torch.equal(batch["labels"][[0, 2]], alone["labels"])
    assert torch.equal(batch["input_ids"][[0, 2]], alone["input_ids"])
    # They bring no picture, count for nothing, and nobody is to be told of them.
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])
    for count in ("tokens", "truncated_samples", "truncated_tokens", "rejected"):
        assert batch[count] == alone[count]


@pytest.mark.parametrize(("packed", "shape"), [(False, (2, 1)), (True, (1, 1))])
def test_a_batch_may_be_fillers_alone(tiny_shards, template, packed, shape):
    # As on the last ranks of an epoch's last step: they still run the model, on one token a row.
    batch = one_batch(dataset_of(tiny_shards, template, packed=packed), [], [])
    assert batch["input_ids"].shape == shape
    assert batch["document_ends"] == ([1] if packed else None)
    assert (batch["labels"] == IGNORED).all()
    assert batch["pixel_values"].shape == (0, 3, S, S)
    assert (batch["tokens"], batch["truncated_samples"], batch["truncated_tokens"], batch["rejected"]) == (0, 0, 0, [])


def test_a_batch_may_be_without_rows(tiny_shards, template):
    # Of a step cut by length, a rank gets no row where there are fewer rows than ranks.
    batch = one_batch(dataset_of(tiny_shards, template))
    assert batch["input_ids"].shape == (1, 1)
    assert (batch["labels"] == IGNORED).all()
    assert (batch["tokens"], len(batch["pixel_values"])) == (0, 0)


def test_packed_documents_follow_one_another(tiny_shards, template):
    # Two packs of two documents and three, and between them a filler, of which nothing is left.
    slots = [Slot(0, 0), Slot(0, 1), Slot(3, 3), Slot(1, 0), Slot(2, 0)]
    dataset = dataset_of(tiny_shards, template, packed=True)
    batch = one_batch(dataset, slots[:2], [], slots[2:])
    examples = [dataset.example(slot) for slot in slots]
    ids = [i for example in examples for i in example.input_ids]
    assert batch["input_ids"].tolist() == [ids]
    assert batch["tokens"] == len(ids)
    ends = [sum(len(example.input_ids) for example in examples[: n + 1]) for n in range(5)]
    assert batch["document_ends"] == ends
    # What a document's last token would predict is the next one's first, which is no business of its: not supervised.
    labels = [label for example in examples for label in [IGNORED, *example.labels[1:]]]
    assert batch["labels"].tolist() == [labels]
    assert torch.equal(batch["pixel_values"], torch.cat([example.pixel_values for example in examples]))


def test_the_last_micro_batch_of_a_step_is_marked(tiny_shards, template):
    stream = plain_stream([7, 5, 1, 11], seed=0)
    loader = BatchLoader(dataset_of(tiny_shards, template), micro_batches(stream, Geometry(6, 2), 0, 2), num_workers=1)
    assert [batch["is_last"] for batch in loader] == [False, False, True] * 2


def test_cut_texts_are_counted(tmp_path, template):
    answer = "A red circle at the top left. " * 20
    samples = {"a": {"json": llava("Q?", answer)}, "b": {"json": llava("Q?", "A.")}, "c": {"json": llava("Q?", answer)}}
    dataset = dataset_of(one_shard(tmp_path, samples), template, max_length=40)
    batch = one_batch(dataset, [Slot(0, 0)], [Slot(0, 1)], [Slot(0, 2)])
    whole, _ = template.encode([Turn("user", "Q?"), Turn("assistant", answer)])
    short, _ = template.encode([Turn("user", "Q?"), Turn("assistant", "A.")])
    assert batch["input_ids"][0].tolist() == batch["input_ids"][2].tolist() == whole[:40]
    assert batch["tokens"] == 80 + len(short)
    assert batch["truncated_samples"] == 2
    assert batch["truncated_tokens"] == 2 * (len(whole) - 40) > 0


def test_images_follow_the_reading_order(tmp_path, template):
    # The model fills runs in reading order: rows first, marks of a row next.
    colours = ["red", "lime", "blue", "white", "black"]
    samples = {
        "a": {"0.png": picture(colours[0]), "1.png": picture(colours[1]), "json": llava("<image> or <image>?")},
        "b": {"json": llava()},
        "c": {f"{i}.png": picture(colours[2 + i]) for i in range(3)} | {"json": llava("<image><image><image>?")},
    }
    dataset = dataset_of(one_shard(tmp_path, samples), template)
    batch = one_batch(dataset, [Slot(0, 0)], [Slot(0, 1)], [Slot(0, 2)])
    found = [tuple(pixels[:, 0, 0].tolist()) for pixels in batch["pixel_values"]]
    assert found == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    image = template.image_run[0]
    assert (batch["input_ids"] == image).sum(1).tolist() == [2 * P, 0, 3 * P]


# --- Samples of every form ---


def text_of(samples: dict[str, dict], folder: Path, template: ChatTemplate, **options) -> list[str]:
    dataset = dataset_of(one_shard(folder, samples), template, **options)
    return [decoded(template, one_batch(dataset, [Slot(0, i)]))[0] for i in range(len(samples))]


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

RED = picture("red")

# Members, the kind that the ledger counts, and the reason that it gives.
BAD = {
    "picture": ({"png": b"no picture", "json": llava()}, "picture cannot be decoded", "the picture cannot be decoded"),
    "cut picture": ({"png": RED[:50], "json": llava()}, "picture cannot be decoded", "the picture cannot be decoded"),
    "not JSON": ({"json": b"{'conversations': []}"}, "malformed conversation", r"its \.json is not JSON"),
    "not text": ({"json": b'{"caption": "\xff"}'}, "malformed conversation", r"its \.json is not JSON"),
    "JSON list": ({"json": b"[]"}, "malformed conversation", r"its \.json holds a list where an object is expected"),
    "no conversation": ({"json": {"label": 3}}, "no caption or conversation", r"the fields are \['label'\]"),
    "no text": ({"png": RED}, "no caption or conversation", r"the fields are \[\]"),
    "empty caption": ({"png": RED, "txt": " \n"}, "no answer", "no answer to learn from"),
    "caption alone": ({"txt": "A cat."}, "caption without a picture", "a caption, but no picture"),
    "marks": (
        {"png": RED, "json": llava("<image><image>")},
        "images and marks differ in number",
        "2 image marks .* but 1 images",
    ),
    "half a character": (
        {"png": RED, "json": b'{"caption": "\\ud83d"}'},
        "malformed conversation",
        "a lone surrogate",
    ),
    "too many images": (
        {f"{i}.png": RED for i in range(60)} | {"json": llava("<image>" * 60)},
        "images longer than max_length",
        "images reach to token .* beyond data.max_length=200",
    ),
    "long question": ({"json": llava("Why? " * 200)}, "nothing supervised", "no token of an answer is left"),
}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_leaves_its_row_empty_and_is_named(tmp_path, template, num_workers):
    samples = {"good": {"json": llava()}, **{f"bad {n}": bad[0] for n, bad in enumerate(BAD.values())}}
    shards = one_shard(tmp_path, samples)
    dataset = dataset_of(shards, template)
    rows = [micro_batch([Slot(0, n + 1)], [Slot(0, 0)]) for n in range(len(BAD))]
    [good] = one_batch(dataset, [Slot(0, 0)])["input_ids"].tolist()
    found = list(BatchLoader(dataset, rows, num_workers))
    for n, (_, kind, message) in enumerate(BAD.values()):
        [rejected] = found[n]["rejected"]
        assert rejected == Rejected(str(shards[0]), f"bad {n}", kind, rejected.reason)
        assert re.search(message, rejected.reason)
        assert "\n" not in rejected.reason
        # The step keeps its shape, and the sample beside it is read as ever.
        assert found[n]["input_ids"][1].tolist() == good
        assert (found[n]["labels"][0] == IGNORED).all()
        assert (found[n]["tokens"], len(found[n]["pixel_values"])) == (len(good), 0)


def test_a_bad_document_is_left_out_of_its_pack(tmp_path, template):
    samples = {"a": {"json": llava()}, "bad": BAD["picture"][0], "c": {"json": llava("Why?")}}
    dataset = dataset_of(one_shard(tmp_path, samples), template, packed=True)
    batch = one_batch(dataset, [Slot(0, 0), Slot(0, 1), Slot(0, 2)])
    assert [rejected.key for rejected in batch["rejected"]] == ["bad"]
    lengths = [len(dataset.example(Slot(0, i)).input_ids) for i in (0, 2)]
    assert batch["document_ends"] == [lengths[0], sum(lengths)]


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
    rows = [micro_batch([Slot(3, i)], [Slot(0, i % 7)]) for i in range(11)]
    pictures = sum(len(batch["pixel_values"]) for batch in BatchLoader(dataset, rows, num_workers))
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
            writer.write(f"{i}", {"json": llava(answer=f"Caption {i}.")})
    reader, before = ShardReader(dataset_of(writer.shards, template).reader.shards), open_shards()
    most = 0
    for _ in range(2):  # the second time, every file has to be opened again
        for i in range(3 * OPEN_SHARDS):
            assert reader.conversation(Slot(i, 0))[-1].text == f"Caption {i}."
            most = max(most, open_shards() - before)
    assert most == OPEN_SHARDS < 100
    reader.close()
    assert open_shards() == before
