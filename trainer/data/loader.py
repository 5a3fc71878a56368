"""Slots of the order -> batches, read and decoded in worker processes.

The training process only receives finished tensors: workers read members by offset, decode, resize and tokenise.
"""

import json
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.data.collate import collate
from trainer.data.conversation import parse_conversation
from trainer.data.index import ShardIndex
from trainer.data.order import SHARDS_PER_WINDOW, Slot
from trainer.data.samples import IGNORE_INDEX, Batch, Example, Sample, Turn
from trainer.data.template import ChatTemplate
from trainer.data.transform import ImageTransform
from trainer.errors import DataError

PREFETCH_BATCHES = 4
"""Micro-batches each worker keeps ready."""

OPEN_SHARDS = 2 * SHARDS_PER_WINDOW
"""Files each process holds open at most: those of two windows, far below the usual limit of 1,024."""


class ShardDataset(Dataset):
    """Samples of shards as examples. Asked for a list of slots, it gives the finished batch, or the DataError."""

    def __init__(
        self,
        shards: list[ShardIndex],
        template: ChatTemplate,
        transform: ImageTransform,
        max_length: int,
        system_prompt: str = "",
        caption_prompt: str = "Describe the image.",
    ):
        self.shards = shards
        self.template = template
        self.transform = transform
        self.max_length = max_length
        self.system_prompt = system_prompt
        self.caption_prompt = caption_prompt
        self._files: dict[Path, int] = {}

    def key(self, slot: Slot) -> str:
        return self.shards[slot.shard].key(slot.sample)

    def read(self, slot: Slot) -> Sample:
        """The sample of a slot, from its shard. Raises DataError if it is not readable."""
        shard = self.shards[slot.shard]
        members = shard.members(slot.sample)
        images: list[bytes] = []
        record: dict = {}
        columns = (shard.is_image[members], shard.is_json[members], shard.offset[members], shard.size[members])
        for is_image, is_json, offset, size in zip(*columns, strict=True):
            content = self._bytes(shard.path, int(offset), int(size))
            if is_image:
                images.append(content)
            elif is_json:
                # A caption beside its JSON (img2dataset) stands in where the JSON has none.
                record = record | _parse_json(content)
            else:
                record = {"caption": content.decode(errors="replace")} | record
        turns = parse_conversation(record, len(images), self.caption_prompt)
        if self.system_prompt and turns[0].role != "system":
            turns = [Turn("system", self.system_prompt), *turns]
        return Sample(shard.key(slot.sample), images, turns)

    def _bytes(self, path: Path, offset: int, size: int) -> bytes:
        try:
            if path not in self._files:
                if len(self._files) == OPEN_SHARDS:
                    os.close(self._files.pop(next(iter(self._files))))
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            content = os.pread(self._files[path], size, offset)
        except OSError as error:
            raise DataError(f"the shard cannot be read ({error.strerror})") from error
        if len(content) != size:
            raise DataError(f"expected {size} bytes at offset {offset}, found {len(content)}: the shard has changed")
        return content

    def example(self, slot: Slot) -> Example:
        """A slot's sample, tokenised and decoded, its length final. Raises DataError naming shard and key."""
        if slot.is_filler:
            return self._filler
        try:
            sample = self.read(slot)
            input_ids, labels = self.template.encode(sample.conversation)
            full_length = len(input_ids)
            input_ids, labels = self.template.truncate(input_ids, labels, self.max_length)
            pixels = [self.transform(image) for image in sample.images]
        except DataError as error:
            raise DataError(f"{self.shards[slot.shard].path}: sample '{self.key(slot)}': {error}") from error
        pixel_values = torch.stack(pixels) if pixels else self._filler.pixel_values
        return Example(sample.key, input_ids, labels, pixel_values, full_length - len(input_ids))

    @cached_property
    def _filler(self) -> Example:
        size = self.transform.size
        pad = self.template.tokenizer.pad_token_id or 0
        return Example(None, [pad], [IGNORE_INDEX], torch.empty(0, 3, size, size, dtype=torch.uint8))

    def __getitems__(self, slots: list[Slot]) -> Batch | DataError:
        try:
            return collate([self.example(slot) for slot in slots], self.template.tokenizer.pad_token_id or 0)
        except DataError as error:
            return error  # raised in the training process, which a worker's traceback would only obscure


def _parse_json(content: bytes) -> dict:
    try:
        record = json.loads(content)
    except ValueError as error:
        raise DataError(f"its .json is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"its .json holds a {type(record).__name__} where an object is expected")
    return {name: value for name, value in record.items() if value is not None}


def _finished(batch: Any) -> Any:
    return batch  # `__getitems__` has made the batch already


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


def batches(
    dataset: ShardDataset, slots: Iterable[list[Slot]], num_workers: int, pin_memory: bool = False
) -> Iterator[Batch]:
    """The batches of lists of slots, in order, whatever the number of workers. Raises DataError of a bad sample."""
    loader = DataLoader(
        dataset,
        batch_sampler=slots,
        collate_fn=_finished,
        num_workers=num_workers,
        # A forked worker has tokenizer and indexes at once; started anew it would import everything again, for seconds.
        multiprocessing_context="fork" if num_workers else None,
        prefetch_factor=PREFETCH_BATCHES if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch
