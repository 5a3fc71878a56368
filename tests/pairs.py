"""Samples that show whether picture and text belong together: each picture is of one colour, which the answer names."""

import io
import json
import re
import tarfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import demo_task
import numpy as np
from PIL import Image

from trainer.config import DataConfig, ShardsConfig
from trainer.data.index import open_index
from trainer.data.loader import BatchLoader, ShardDataset
from trainer.data.order import MicroBatch, Order, Slot, Source, Stream
from trainer.data.reader import ShardReader
from trainer.data.samples import Batch
from trainer.data.template import ChatTemplate
from trainer.data.transform import ImageTransform
from trainer.models.tokenization_qwen import IMAGE_PLACEHOLDER, build_tokenizer
from trainer.open_data import open_cache, open_reader, open_sources

P = 4
"""Tokens of an image."""

S = 16
"""Pixels a side."""


def make_template(folder: Path) -> ChatTemplate:
    """The template of the demo's vocabulary, P tokens an image."""
    demo_task.write_vocabulary(folder / "qwen.tiktoken", seed=0)
    tokenizer = build_tokenizer(folder / "qwen.tiktoken")
    return ChatTemplate(tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER), P)


def colour_of(key: str, number: int = 0) -> str:
    """ "#rrggbb" of a sample's picture."""
    return f"#{sha256(f'{key} {number}'.encode()).hexdigest()[:6]}"


def picture(colour: str, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (S, S), colour).save(buffer, form)
    return buffer.getvalue()


def pair(key: str, images: int = 1, words: int = 0, shown: str | None = None) -> dict[str, bytes]:
    """Members of a sample whose answer has its key, the colours of its pictures, and some words more.

    shown: colour of the only picture, where it is not to be the key's own.
    """
    colours = [shown] if shown else [colour_of(key, number) for number in range(images)]
    answer = " ".join([f"key({key})", *colours, *["ring"] * words])
    turns = [{"from": "human", "value": "<image>" * len(colours) + "Which?"}, {"from": "gpt", "value": answer}]
    pictures = {f"{number}.png": picture(colour) for number, colour in enumerate(colours)}
    return {**pictures, "json": json.dumps({"conversations": turns}).encode()}


def write_tar(file: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar with these members, written by Python's own tarfile."""
    with tarfile.open(file, "w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def members_of(samples: dict[str, dict[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension}", content) for key, parts in samples.items() for extension, content in parts.items()]


def write_pairs(file: Path, samples: int, start: int = 0, images: tuple[int, ...] = (1, 2, 0)) -> Path:
    """A tar of so many pairs, keys FILE-N; the number of pictures and of words changes from one to the next."""
    keys = [f"{file.stem}-{start + i}" for i in range(samples)]
    pairs = {key: pair(key, images[i % len(images)], words=(i * 7) % 20) for i, key in enumerate(keys)}
    return write_tar(file, members_of(pairs))


def dataset_of(tars: list[Path], template: ChatTemplate, max_length: int = 200, **options) -> ShardDataset:
    """The dataset of some tars; `options` are the reader's, `transform` and `packed` the dataset's."""
    transform, packed = options.pop("transform", ImageTransform(S)), options.pop("packed", False)
    reader = ShardReader([open_index(tar).shard for tar in tars], **options)
    return ShardDataset(reader, template, transform, max_length, packed)


def plain_stream(sizes: list[int], seed: int | None, end: int | None = None) -> Stream:
    """The stream of one source, one sample a row."""
    return Stream([Source(Order(sizes, seed), lambda _epoch, shard, sample: [Slot(shard, sample)])], end=end)


@dataclass(frozen=True)
class Document:
    """What a batch holds of one sample."""

    key: str
    colours: list[str]


def documents(batch: Batch, template: ChatTemplate) -> list[Document]:
    """The pairs of a batch in reading order. Fails where a picture is not of the colour that its text names."""
    rows = batch["input_ids"].tolist()
    if batch["document_ends"] is not None:
        starts = [0, *batch["document_ends"]]
        rows = [rows[0][start:end] for start, end in zip(starts, starts[1:], strict=False)]
    pictures = iter(batch["pixel_values"])
    found = []
    for row in rows:
        text = template.tokenizer.decode(row)
        if not (key := re.search(r"key\(([^)]*)\)", text)):
            assert template.image_run[0] not in row, f"a picture beside {text!r}"
            continue  # a filler
        colours = re.findall(r"#[0-9a-f]{6}", text)
        assert row.count(template.image_run[0]) == P * len(colours)
        shown = [next(pictures) for _ in colours]
        for colour, pixels in zip(colours, shown, strict=True):
            assert np.unique(pixels.flatten(1).numpy(), axis=1).T.tolist() == [list(bytes.fromhex(colour[1:]))], text
        found.append(Document(key[1], colours))
    assert next(pictures, None) is None, "more pictures than the texts name"
    return found


def opened(tars: Path, template: ChatTemplate) -> ShardDataset:
    """The dataset of all tars of a folder, opened as a run does."""
    data, cache = DataConfig(system_prompt=""), open_cache(DataConfig())
    sources = open_sources([ShardsConfig("a", f"{tars}/*.tar")], cache)
    return ShardDataset(open_reader(sources, data, cache), template, ImageTransform(S), max_length=300)


def read(dataset: ShardDataset) -> tuple[list[str], list[tuple[str, str]]]:
    """Keys of what a run would learn from, each checked to be with its own picture; (key, kind) of what is left out."""
    rows = [
        [Slot(n, sample)] for n, shard in enumerate(dataset.reader.shards) for sample in range(len(shard))
    ]  # fmt: skip
    keys: list[str] = []
    rejected: list[tuple[str, str]] = []
    for batch in BatchLoader(dataset, [MicroBatch([row], is_last=True) for row in rows], num_workers=1):
        keys += [document.key for document in documents(batch, dataset.template)]
        rejected += [(entry.key, entry.kind) for entry in batch["rejected"]]
    return keys, rejected
