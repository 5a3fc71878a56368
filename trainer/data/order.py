"""Which sample belongs to which step.

    shards -> shuffle(seed, epoch) -> windows of shards -> shuffle inside -> global batches -> this rank's share

A pure function of (data, seed, epoch): no rank, worker or clock enters the stream, and position N is found without
walking through the positions before it. The stream runs through the epochs without a seam, so a batch may hold the end
of one epoch and the start of the next; every epoch has every sample once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SHARDS_PER_WINDOW = 16
"""Shards that are mixed with each other: more mix better, fewer keep reading local."""


def hashed(count: int, *seeds: int) -> np.ndarray:
    """(count,) uint64, a hash of (seeds, i) for each i. Splitmix64 (Steele et al. 2014), written out because the
    generators of numpy may change between versions, and a resumed run must not."""
    state = np.uint64(0)
    for seed in seeds:
        state = _mix(np.array([state ^ np.uint64(seed % 2**64)]))[0]
    return _mix(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + state)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(count: int, *seeds: int) -> np.ndarray:
    """A permutation of range(count), a function of `seeds` alone."""
    return np.argsort(hashed(count, *seeds), kind="stable")


@dataclass(frozen=True)
class Slot:
    """A place in the stream: which sample of which shard, or, with shard -1, a filler behind the last sample."""

    shard: int
    sample: int

    @property
    def is_filler(self) -> bool:
        return self.shard < 0


FILLER = Slot(-1, -1)


class Order:
    """The stream of all samples of shards with so many samples each.

    seed: of the shuffling; None keeps the samples in their given order (held-out data).
    end: length of the stream in samples, fillers after it; None for no end.
    """

    def __init__(self, shard_sizes: list[int], seed: int | None, end: int | None = None):
        self.sizes = np.array(shard_sizes, dtype=np.int64)
        self.seed = seed
        self.epoch_size = int(self.sizes.sum())
        self.end = end
        # Bound to the instance: two epochs are alive around a seam, two windows around a window's end.
        self._shards = lru_cache(maxsize=2)(self._shards_of_epoch)
        self._window = lru_cache(maxsize=2)(self._window_samples)

    def _shards_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in this epoch's order, and where each window of them ends in it, in samples."""
        shards = np.arange(len(self.sizes)) if self.seed is None else permutation(len(self.sizes), self.seed, epoch)
        ends = np.add.reduceat(self.sizes[shards], np.arange(0, len(shards), SHARDS_PER_WINDOW)).cumsum()
        return shards, ends

    def _window_samples(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, sample in shard) of every sample of a window, in this epoch's order."""
        shards = self._shards(epoch)[0][window * SHARDS_PER_WINDOW : (window + 1) * SHARDS_PER_WINDOW]
        sizes = self.sizes[shards]
        shard = np.repeat(shards, sizes)
        sample = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        if self.seed is not None:
            shuffled = permutation(len(shard), self.seed, epoch, window + 1)
            shard, sample = shard[shuffled], sample[shuffled]
        return shard, sample

    def slot(self, position: int) -> Slot:
        """The sample at a position of the stream."""
        if self.end is not None and position >= self.end:
            return FILLER
        epoch, position = divmod(position, self.epoch_size)
        ends = self._shards(epoch)[1]
        window = int(np.searchsorted(ends, position, side="right"))
        shard, sample = self._window(epoch, window)
        position -= int(ends[window - 1]) if window else 0
        return Slot(int(shard[position]), int(sample[position]))


@dataclass(frozen=True)
class Geometry:
    """How a global batch is cut into the micro-batches of ranks."""

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def accumulation_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)


def global_batch(order: Order, step: int, size: int) -> list[Slot]:
    """The samples of a step (counted from 0), for all ranks."""
    return [order.slot(position) for position in range(step * size, (step + 1) * size)]


def micro_batches(order: Order, geometry: Geometry, first_step: int, last_step: int) -> Iterator[list[Slot]]:
    """This rank's micro-batches of the steps [first_step, last_step), `accumulation_steps` of them a step."""
    size = geometry.micro_batch_size
    for step in range(first_step, last_step):
        slots = global_batch(order, step, geometry.global_batch_size)
        for micro_step in range(geometry.accumulation_steps):
            start = (micro_step * geometry.world_size + geometry.rank) * size
            yield slots[start : start + size]
