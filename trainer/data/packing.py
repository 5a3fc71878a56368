"""Which samples share a pack, from their lengths alone.

    lengths of a group of shards -> shapes of its packs -> their samples, epoch by epoch

The shapes depend on how many samples there are of each length, and on nothing else. So a group has the same number of
packs in every epoch, and any step is found without packing what lies before it; which of the samples of one length goes
where is shuffled anew in every epoch.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from trainer.data.order import hashed

PACKING_VERSION = 1
"""Of the rule by which samples come into packs: a run cannot go on under another one."""

GROUP_SAMPLES = 1000
"""Shards are packed in groups of at least so many samples; far fewer would leave packs half empty."""

PAIRS_TRIED = 8
"""More of them fill packs hardly better."""


def group_shards(shard_sizes: list[int]) -> list[list[int]]:
    """Consecutive shards, put together until a group has `GROUP_SAMPLES`; the last group may have fewer."""
    groups: list[list[int]] = [[]]
    samples = 0
    for shard, size in enumerate(shard_sizes):
        if samples >= GROUP_SAMPLES:
            groups.append([])
            samples = 0
        groups[-1].append(shard)
        samples += size
    return groups


@dataclass(frozen=True)
class PackShapes:
    """Packs as lists of lengths."""

    lengths: np.ndarray
    """(samples,) int64, pack after pack."""
    ends: np.ndarray
    """(packs,) int64: where each pack ends in `lengths`."""

    @property
    def count(self) -> int:
        return len(self.ends)


def pack_shapes(lengths: np.ndarray, capacity: int) -> PackShapes:
    """Fills one pack after another with the longest that fits, and the last places with the best pair.

    lengths: (S,) int; those beyond `capacity` count as `capacity`, those below 1 as 1. A shape is used as often as
    there are samples for it, so the work grows with the different lengths more than with the samples.
    """
    counts = np.bincount(np.clip(lengths, 1, capacity), minlength=capacity + 1).tolist()
    present = 0  # bit n is set while there are samples of length n: "the longest that fits" is one look at a number
    for length, count in enumerate(counts):
        present |= bool(count) << length
    shapes: list[tuple[list[int], int]] = []
    while present:
        shape = _next_shape(counts, present, capacity)
        times = min(counts[length] // n for length, n in Counter(shape).items())
        for length in shape:
            counts[length] -= times
            if not counts[length]:
                present &= ~(1 << length)
        shapes.append((shape, times))
    parts = [np.tile(shape, times) for shape, times in shapes]
    sizes = [np.full(times, len(shape)) for shape, times in shapes]
    none = np.zeros(0, dtype=np.int64)
    return PackShapes(np.concatenate([none, *parts]), np.concatenate([none, *sizes]).cumsum())


def _next_shape(counts: list[int], present: int, capacity: int) -> list[int]:
    """The lengths of a pack, out of those that are there; `counts` is left as it was."""
    shape: list[int] = []
    room, shortest = capacity, _lowest(present)
    while fitting := present & (2 << room) - 1:
        # Where no more than two go in, the longest may leave a gap that another pair would not.
        few = shape and room < 3 * shortest
        length = _best_of_pair(counts, fitting, room, shortest) if few else fitting.bit_length() - 1
        shape.append(length)
        room -= length
        counts[length] -= 1
        if not counts[length]:
            present &= ~(1 << length)
            shortest = _lowest(present)
    for length in shape:
        counts[length] += 1
    return shape


def _best_of_pair(counts: list[int], fitting: int, room: int, shortest: int) -> int:
    """The first of the lengths, one or two of `fitting`, that fill a room best; at most `PAIRS_TRIED` are tried."""
    best = choice = fitting.bit_length() - 1
    candidates = fitting & (2 << max(0, room - shortest)) - 1  # those that leave room for another
    for _ in range(PAIRS_TRIED):
        if not candidates or best == room:
            break
        first = candidates.bit_length() - 1
        candidates ^= 1 << first
        others = fitting & (2 << room - first) - 1
        if counts[first] < 2:
            others &= ~(1 << first)
        if others and (together := first + others.bit_length() - 1) > best:
            best, choice = together, first
    return choice


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def assign(lengths: np.ndarray, shapes: PackShapes, capacity: int, *seeds: int) -> np.ndarray:
    """Which samples are in which pack, a function of `seeds`: (S,) sample numbers, pack after pack as in `shapes`."""
    clipped = np.clip(lengths, 1, capacity)
    samples = np.empty(len(lengths), dtype=np.int64)
    # Of each length, the samples in a random order take the places in theirs.
    samples[np.argsort(shapes.lengths, kind="stable")] = np.lexsort((hashed(len(lengths), *seeds), clipped))
    return samples
