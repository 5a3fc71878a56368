"""Sources of a configuration -> the stream that a run trains on.

tars -> shards -> [lengths -> packs] -> stream of rows, and its fingerprint
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from trainer.data.index import Shard
from trainer.data.lengths import Lengths
from trainer.data.order import SHARDS_PER_WINDOW, Order, Row, Slot, Source, Stream
from trainer.data.packing import PACKING_VERSION, assign, group_shards, pack_shapes
from trainer.dist import log
from trainer.errors import DataError


@dataclass(frozen=True)
class NamedSource:
    """The shards of one source of a configuration."""

    name: str
    shards: list[Shard]
    weight: float | None = None


class PackedOrder:
    """The packs of some shards: their number, and the samples of each, epoch by epoch.

    first: number of the first of the shards in the list of all shards.
    """

    def __init__(self, sizes: list[int], first: int, lengths: Lengths, max_length: int, seed: int):
        self.groups = [[first + shard for shard in group] for group in group_shards(sizes)]
        self.lengths = lengths
        self.max_length = max_length
        self.seed = seed
        self._packs = lru_cache(maxsize=2 * SHARDS_PER_WINDOW)(self._assign)
        self.order = Order(lengths.packs(self.groups, max_length), seed)

    def row(self, epoch: int, group: int, pack: int) -> Row:
        """The samples of a pack in an epoch."""
        shard, sample, ends = self._packs(epoch, group)
        places = slice(ends[pack - 1] if pack else 0, ends[pack])
        return [Slot(*place) for place in zip(shard[places].tolist(), sample[places].tolist(), strict=True)]

    def _assign(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard and sample in it, each (samples of the group,), pack after pack; and where each pack ends."""
        lengths = self.lengths.of_group(self.groups[group])
        shapes = pack_shapes(lengths, self.max_length)
        chosen = assign(lengths, shapes, self.max_length, self.seed, epoch, group)
        sizes = [len(self.lengths.reader.shards[shard]) for shard in self.groups[group]]
        shard = np.repeat(self.groups[group], sizes)
        sample = np.concatenate([np.arange(size) for size in sizes])
        return shard[chosen], sample[chosen], shapes.ends


def make_stream(
    sources: list[NamedSource], seed: int | None, lengths: Lengths | None = None, max_length: int | None = None
) -> Stream:
    """The endless stream of sources: of samples, or of packs of `max_length` tokens where `lengths` is given with it.

    Sources with weights go through epochs of their own; without weights they are one source, and an epoch has every
    sample of all of them once. seed: of the order; None keeps the given one. Raises DataError where there is no sample.
    """
    parts = _parts(sources)
    weights = [source.weight or 1.0 for source in sources][: len(parts)]
    made, first = [], 0
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        sizes = [len(shard) for shard in part]
        if not sum(sizes):
            named = f" of source '{sources[number].name}'" if len(parts) > 1 else ""
            raise DataError(f"the shards{named} hold no sample")
        own_seed = None if seed is None else seed + number
        if lengths is not None and max_length is not None:
            assert own_seed is not None
            packed = PackedOrder(sizes, first, lengths, max_length, own_seed)
            made.append(Source(packed.order, packed.row, weight))
        else:
            made.append(Source(Order(sizes, own_seed), partial(_sample_row, first), weight))
        first += len(part)
    return Stream(made, seed or 0)


def _sample_row(first: int, _epoch: int, shard: int, sample: int) -> Row:
    return [Slot(first + shard, sample)]


def shards_at_a_time(sources: list[NamedSource], packing: bool) -> int:
    """Shards that are read at a time: those of two windows of each part of the stream, whose units may be groups."""
    count = 0
    for part in _parts(sources):
        groups = group_shards([len(shard) for shard in part]) if packing else [[i] for i in range(len(part))]
        count += sum(sorted(map(len, groups))[-2 * SHARDS_PER_WINDOW :])
    return count


def _parts(sources: list[NamedSource]) -> list[list[Shard]]:
    """The shards of each source with a weight, or of all together."""
    parts = [source.shards for source in sources]
    if all(source.weight is None for source in sources):
        return [[shard for part in parts for shard in part]]
    return parts


def check_distinct(shards: list[Shard]) -> None:
    """Raises DataError, naming both, where two shards hold the same: their samples would be seen twice an epoch.

    Other samples under the same keys are read as what they are, and logged: in curves and ledgers they look alike.
    """
    seen: dict[str, Shard] = {}
    for shard in shards:
        if shard.samples and shard.digest in seen:
            raise DataError(f"{seen[shard.digest].name} and {shard.name} hold the same samples; leave one of them out")
        if shard.samples and shard.keys in seen:
            log.warning("%s and %s hold different samples under the same keys", seen[shard.keys].name, shard.name)
        seen[shard.digest] = seen[shard.keys] = shard


def describe(sources: list[NamedSource], lengths: Lengths | None, max_length: int | None) -> str:
    """How samples become rows, in words that differ wherever the stream of the same shards would."""
    words = "samples"
    if lengths is not None and max_length is not None:
        words = f"packs of {max_length} tokens (lengths {lengths.fingerprint}, rule {PACKING_VERSION})"
    shares = [
        f"{source.name} ({len(source.shards)} shards) {source.weight!r}"
        for source in sources
        if source.weight is not None
    ]
    return words + (f", mixed by weight: {', '.join(shares)}" if shares else "")
