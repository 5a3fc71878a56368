"""Which sample belongs to which step.

    shards -> shuffle(seed, epoch) -> windows of shards -> shuffle inside -> [mix sources by weight] -> rows
           -> global batches -> this rank's micro-batches

A row is a sample or, with packing, a pack of samples. A pure function of (data, seed, epoch): no rank, worker or clock
enters the stream, and position N is found without walking through the positions before it. The stream runs through the
epochs without a seam, so a batch may hold the end of one epoch and the start of the next; every epoch of a source has
every sample once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np

SHARDS_PER_WINDOW = 16
"""Shards that are mixed with each other: more mix better, fewer keep reading local."""

MIX_BLOCK = 1024
"""Rows over which the shares of weighted sources come out even."""


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
    """Where a sample lies: which shard, and which of its samples."""

    shard: int
    sample: int


Row = list[Slot]
"""What becomes one row of a batch: a sample, the samples of a pack, or none (a filler behind the last sample)."""


class Order:
    """The shuffled stream of all units of shards with so many units each; a unit is a sample or a pack.

    seed: of the shuffling; None keeps the units in their given order (held-out data).
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int | None):
        self.sizes = np.array(shard_sizes, dtype=np.int64)
        self.seed = seed
        self.epoch_size = int(self.sizes.sum())
        # Bound to the instance: two epochs are alive around a seam, two windows around a window's end.
        self._shards = lru_cache(maxsize=2)(self._shards_of_epoch)
        self._window = lru_cache(maxsize=2)(self._window_units)

    def _shards_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in this epoch's order, and where each window of them ends in it, in units."""
        shards = np.arange(len(self.sizes)) if self.seed is None else permutation(len(self.sizes), self.seed, epoch)
        ends = np.add.reduceat(self.sizes[shards], np.arange(0, len(shards), SHARDS_PER_WINDOW)).cumsum()
        return shards, ends

    def _window_units(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, unit in shard) of every unit of a window, in this epoch's order."""
        shards = self._shards(epoch)[0][window * SHARDS_PER_WINDOW : (window + 1) * SHARDS_PER_WINDOW]
        sizes = self.sizes[shards]
        shard = np.repeat(shards, sizes)
        unit = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        if self.seed is not None:
            shuffled = permutation(len(shard), self.seed, epoch, window + 1)
            shard, unit = shard[shuffled], unit[shuffled]
        return shard, unit

    def place(self, position: int) -> tuple[int, int, int]:
        """(epoch, shard, unit in shard) at a position of the stream."""
        epoch, position = divmod(position, self.epoch_size)
        ends = self._shards(epoch)[1]
        window = int(np.searchsorted(ends, position, side="right"))
        shard, unit = self._window(epoch, window)
        position -= int(ends[window - 1]) if window else 0
        return epoch, int(shard[position]), int(unit[position])


@dataclass(frozen=True)
class Source:
    """One stream of a mixture."""

    order: Order
    row: Callable[[int, int, int], Row]
    """(epoch, shard, unit in shard) of `order` -> the samples there."""
    weight: float = 1.0
    """Share of the rows, relative to the other sources'."""


class Stream:
    """The rows of one source, or of several mixed by weight, each going through its own epochs.

    seed: of the mixing. end: length of the stream in rows, fillers after it; None for no end.
    """

    def __init__(self, sources: list[Source], seed: int = 0, end: int | None = None):
        self.sources = sources
        self.seed = seed
        self.end = end
        self._weights = [Fraction(source.weight) for source in sources]
        self._block = lru_cache(maxsize=2)(self._mixed_block)

    def row(self, position: int) -> Row:
        """The samples at a position of the stream."""
        if self.end is not None and position >= self.end:
            return []
        number, position = self._find(position)
        source = self.sources[number]
        return source.row(*source.order.place(position))

    def counts(self, position: int) -> list[int]:
        """Rows that each source has given before a position."""
        position = position if self.end is None else min(position, self.end)
        if len(self.sources) == 1:
            return [position]
        block, rest = divmod(position, MIX_BLOCK)
        before, chosen = self._block(block)
        return (before + np.bincount(chosen[:rest], minlength=len(before))).tolist()

    def _find(self, position: int) -> tuple[int, int]:
        """The source of a position, and the position in that source's own stream."""
        if len(self.sources) == 1:
            return 0, position
        block, rest = divmod(position, MIX_BLOCK)
        before, chosen = self._block(block)
        source = int(chosen[rest])
        return source, int(before[source] + (chosen[:rest] == source).sum())

    def _mixed_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(sources,) int64: rows of each source before a block; (MIX_BLOCK,) int64: the source of each row of it."""
        before, after = (np.array(share(rows * MIX_BLOCK, self._weights)) for rows in (block, block + 1))
        sources = np.repeat(np.arange(len(before)), after - before)
        return before, sources[permutation(MIX_BLOCK, self.seed, block)]


def share(rows: int, weights: list[Fraction]) -> list[int]:
    """Whole numbers that sum to `rows`, by weight: at most one row off for up to four weights, half a row more for
    every doubling of their number.

    One half of the weights against the other, and so on inside each half: in this way no number falls when `rows`
    grows, as it may where all are rounded side by side. Exact, in fractions.
    """
    if len(weights) == 1:
        return [rows]
    middle = len(weights) // 2
    left, right = weights[:middle], weights[middle:]
    own = int(rows * sum(left) / sum(weights) + Fraction(1, 2))
    return share(own, left) + share(rows - own, right)


@dataclass(frozen=True)
class Geometry:
    """How a global batch is cut into the micro-batches of ranks."""

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    micro_batch_tokens: int | None = None
    """Padded tokens of a micro-batch at most; rows of like length are then put together, in place of a fixed size."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass of one rank."""

    rows: list[Row]
    is_last: bool
    """Of its step."""


def global_batch(stream: Stream, step: int, size: int) -> list[Row]:
    """The rows of a step (counted from 0), for all ranks."""
    return [stream.row(position) for position in range(step * size, (step + 1) * size)]


def micro_batches(
    stream: Stream,
    geometry: Geometry,
    first_step: int,
    last_step: int,
    length: Callable[[Slot], int] | None = None,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the steps [first_step, last_step), for all ranks equally many a step.

    length: tokens of a sample; needed where `micro_batch_tokens` is set.
    """
    for step in range(first_step, last_step):
        rows = global_batch(stream, step, geometry.global_batch_size)
        if geometry.micro_batch_tokens is None:
            size = geometry.micro_batch_size
            cut = [rows[start : start + size] for start in range(0, len(rows), size)]
        else:
            assert length is not None
            lengths = [sum(map(length, row)) for row in rows]
            groups = group_by_length(lengths, geometry.micro_batch_tokens, geometry.world_size)
            cut = [[rows[i] for i in group] for group in groups]
        own = cut[geometry.rank :: geometry.world_size]
        for number, micro_batch in enumerate(own, start=1):
            yield MicroBatch(micro_batch, is_last=number == len(own))


def group_by_length(lengths: list[int], budget: int, world_size: int) -> list[list[int]]:
    """Rows of like length put together: (rows x longest) of a group is at most `budget`, unless a row alone is longer.

    The number of groups is a multiple of `world_size`, so that all ranks have equally many; groups that run at the same
    time are of like cost. A group is empty only where every row stands alone already. Returns row numbers.
    """
    rows = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    starts = [0]
    for number, row in enumerate(rows):
        longest = lengths[rows[starts[-1]]]
        if (number - starts[-1] + 1) * longest > budget and number > starts[-1]:
            starts.append(number)
        assert lengths[row] <= longest
    groups = [rows[start:end] for start, end in pairwise([*starts, len(rows)])]
    while len(groups) % world_size:
        widest = max(range(len(groups)), key=lambda i: len(groups[i]))
        group = groups[widest]
        if len(group) < 2:
            groups.append([])
            continue
        groups[widest : widest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return groups
