"""Rows of the stream -> batches, read and decoded in worker processes.

The training process only receives finished tensors: workers read members by offset, decode, resize and tokenise.
"""

import multiprocessing
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.data.collate import collate
from trainer.data.fork import LiveForkContext
from trainer.data.order import MicroBatch, Slot
from trainer.data.reader import ShardReader
from trainer.data.samples import Batch, Example, Rejected
from trainer.data.template import ChatTemplate
from trainer.data.transform import ImageTransform
from trainer.errors import BadSample, DataError
from trainer.stopping import ignore_in_worker

KILL_SECONDS = 5.0
PREFETCH_BATCHES = 4
"""Micro-batches each worker keeps ready."""


class ShardDataset(Dataset):
    """Samples of shards as examples. Asked for a micro-batch's rows, it gives the finished batch, or the DataError."""

    def __init__(
        self,
        reader: ShardReader,
        template: ChatTemplate,
        transform: ImageTransform,
        max_length: int,
        packed: bool = False,
    ):
        self.reader = reader
        self.template = template
        self.transform = transform
        self.max_length = max_length
        self.packed = packed

    def example(self, slot: Slot) -> Example:
        """A slot's sample, tokenised and decoded, its length final. Raises BadSample, or DataError naming the shard."""
        input_ids, labels = self.template.encode(self.reader.conversation(slot))
        full_length = len(input_ids)
        input_ids, labels = self.template.truncate(input_ids, labels, self.max_length)
        pixels = [self.transform(image) for image in self.reader.images(slot)]
        size = self.transform.size
        pixel_values = torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return Example(input_ids, labels, pixel_values, full_length - len(input_ids))

    def batch(self, micro_batch: MicroBatch) -> Batch:
        """The batch of a micro-batch's rows. A sample that is of no use leaves its place empty, and is named.

        Empty, and not filled with another sample: so none is seen twice, and the choice needs no memory.
        """
        keys: list[str] = []
        rejected: list[Rejected] = []
        rows: list[list[Example]] = []
        for row in micro_batch.rows:
            rows.append([])
            for slot in row:
                try:
                    rows[-1].append(self.example(slot))
                    keys.append(self.reader.key(slot))
                except BadSample as error:
                    shard = self.reader.shards[slot.shard].name
                    rejected.append(Rejected(shard, self.reader.key(slot), error.kind, str(error)))
        pad = self.template.tokenizer.pad_token_id or 0
        return collate(rows, pad, self.transform.size, self.packed, keys, rejected, micro_batch.is_last)

    def __getitems__(self, micro_batch: MicroBatch) -> Batch | DataError:
        try:
            return self.batch(micro_batch)
        except DataError as error:
            return error  # raised in the training process, which a worker's traceback would only obscure


def _finished(batch: Any) -> Any:
    return batch  # `__getitems__` has made the batch already


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    ignore_in_worker()


class BatchLoader:
    """The batches of micro-batches, in order, whatever the number of workers; `closing` it ends the workers.

    The workers start with it, so that a caller can have them forked before it starts threads of its own. `next` raises
    DataError of a damaged shard.
    """

    def __init__(
        self, dataset: ShardDataset, micro_batches: Iterable[MicroBatch], num_workers: int, pin_memory: bool = False
    ):
        loader = DataLoader(
            dataset,
            batch_sampler=micro_batches,  # type: ignore[arg-type]
            collate_fn=_finished,
            num_workers=num_workers,
            # A forked worker has tokenizer and indexes at once; started anew it would import everything again.
            multiprocessing_context=LiveForkContext() if num_workers else None,
            prefetch_factor=PREFETCH_BATCHES if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
        )
        others = set(multiprocessing.active_children())
        self._found: Any = iter(loader)
        self._workers = set(multiprocessing.active_children()) - others

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> Batch:
        batch = next(self._found)
        if isinstance(batch, DataError):
            raise batch
        return batch

    def close(self) -> None:
        """Ends the workers, those too that are at something and deaf to signals: Python waits for them at its exit."""
        # PyTorch would do it once nobody holds its iterator, but the traceback of an error may hold it to the end.
        getattr(self._found, "_shutdown_workers", lambda: None)()
        self._found = iter(())
        for worker in self._workers:
            worker.kill()
            worker.join(timeout=KILL_SECONDS)  # one in a read from a file system that is away stays until that is back


def fetch(loader: Iterator[Batch]) -> tuple[list[Batch], DataError | None]:
    """The batches of a step, or the error that one of them met: all ranks are to hear of it before they leave."""
    micro: list[Batch] = []
    try:
        while not micro or not micro[-1]["is_last"]:
            micro.append(next(loader))
    except DataError as error:
        return [], error
    return micro, None
