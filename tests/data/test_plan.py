"""Sources become one stream: packs found without walking, weights kept, no sample lost or seen twice.

Shards and lengths are stood in for by their numbers, which is all that the order may depend on.
"""

from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import packing
from trainer.data.index import Shard
from trainer.data.order import MIX_BLOCK, Slot, Stream
from trainer.data.packing import pack_shapes
from trainer.data.plan import NamedSource, check_distinct, describe, make_stream, shards_at_a_time
from trainer.errors import DataError

MAX_LENGTH = 100


def shards_of(sizes: list[int], first: int = 0) -> list[Shard]:
    return [Shard(Path(f"{first + n}.tar"), size, f"{first + n:064x}", 0, 0) for n, size in enumerate(sizes)]


@dataclass
class NumberedLengths:
    """Lengths of samples as `Lengths` has them, made up from a seed."""

    shards: list[Shard]
    seed: int = 0
    reader: SimpleNamespace = field(init=False)
    fingerprint = "made up"

    def __post_init__(self) -> None:
        self.reader = SimpleNamespace(shards=self.shards)

    def of(self, shard: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, shard])
        return rng.integers(0, MAX_LENGTH + 10, self.shards[shard].samples)

    def of_group(self, shards: list[int]) -> np.ndarray:
        return np.concatenate([self.of(shard) for shard in shards])

    def packs(self, groups: list[list[int]], max_length: int) -> list[int]:
        return [pack_shapes(self.of_group(group), max_length).count for group in groups]

    def __call__(self, slot: Slot) -> int:
        return int(self.of(slot.shard)[slot.sample])


def mixture(sizes: list[list[int]], weights: list[float] | None) -> list[NamedSource]:
    """Sources of shards with so many samples each."""
    sources, first = [], 0
    for number, part in enumerate(sizes):
        sources.append(NamedSource(f"s{number}", shards_of(part, first), weights[number] if weights else None))
        first += len(part)
    return sources


def stream_of(sources: list[NamedSource], seed: int, packed: bool) -> Stream:
    lengths = NumberedLengths([shard for source in sources for shard in source.shards]) if packed else None
    return make_stream(sources, seed, lengths, MAX_LENGTH)


def slots(shards: list[Shard], first: int = 0) -> Counter:
    return Counter(Slot(first + n, sample) for n, shard in enumerate(shards) for sample in range(shard.samples))


def samples_of(stream: Stream, first: int, last: int) -> list[Slot]:
    return [slot for position in range(first, last) for slot in stream.row(position)]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Groups of at least 12 samples, so that small shards make several."""
    monkeypatch.setattr(packing, "GROUP_SAMPLES", 12)


source_sizes = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)
mixtures = st.lists(source_sizes, min_size=1, max_size=4)
seeds = st.integers(0, 2**63)
examples = settings(deadline=None, max_examples=40)


# --- Packs ---


@examples
@given(source_sizes, seeds, st.integers(0, 1000))
def test_an_epoch_of_packs_has_every_sample_once(sizes, seed, epoch):
    sources = mixture([sizes], None)
    stream = stream_of(sources, seed, packed=True)
    packs = stream.sources[0].order.epoch_size
    lengths = NumberedLengths(sources[0].shards)
    for following in (epoch, epoch + 1):  # equally many packs in every epoch
        rows = [stream.row(position) for position in range(following * packs, (following + 1) * packs)]
        assert Counter(slot for row in rows for slot in row) == slots(sources[0].shards)
        assert all(rows)
        assert all(sum(max(1, min(lengths(slot), MAX_LENGTH)) for slot in row) <= MAX_LENGTH for row in rows)


@examples
@given(source_sizes, seeds, st.integers(0, 10**6))
def test_a_pack_is_found_without_those_before_it(sizes, seed, position):
    sources = mixture([sizes], None)
    used = stream_of(sources, seed, packed=True)
    for before in (0, 1, position // 2):
        used.row(before)
    assert used.row(position) == stream_of(sources, seed, packed=True).row(position)


def test_packs_differ_between_epochs_and_seeds():
    sources = mixture([[40, 40]], None)
    stream, other = stream_of(sources, 1, packed=True), stream_of(sources, 2, packed=True)
    packs = stream.sources[0].order.epoch_size
    first, second = ({tuple(sorted(map(str, stream.row(e * packs + i)))) for i in range(packs)} for e in range(2))
    assert first != second
    assert first != {tuple(sorted(map(str, other.row(i)))) for i in range(packs)}


# --- Mixtures ---

weights_of_four = st.lists(st.floats(0.01, 100), min_size=4, max_size=4)


@examples
@given(mixtures.filter(lambda parts: len(parts) > 1), weights_of_four, seeds, st.booleans())
def test_each_source_goes_through_its_own_epochs(parts, weights, seed, packed):
    sources = mixture(parts, weights[: len(parts)])
    stream = stream_of(sources, seed, packed)
    drawn: list[list[Slot]] = [[] for _ in sources]
    rows: list[int] = [0] * len(sources)
    number_of = [number for number, source in enumerate(sources) for _ in source.shards]
    first_of = [sum(len(source.shards) for source in sources[:number]) for number in range(len(sources))]
    for position in range(1500):
        row = stream.row(position)
        (number,) = {number_of[slot.shard] for slot in row}  # a pack is of one source
        # A source's rows come in the order of its own stream, and none is left out.
        source = stream.sources[number]
        assert row == source.row(*source.order.place(rows[number]))
        rows[number] += 1
        drawn[number] += row
        if rows[number] % source.order.epoch_size == 0:
            assert Counter(drawn[number]) == slots(sources[number].shards, first_of[number])
            drawn[number].clear()
    assert stream.counts(1500) == rows


@settings(deadline=None, max_examples=300)
@given(st.lists(st.floats(1e-6, 1000), min_size=2, max_size=16), seeds, st.integers(1, 10**9))
def test_shares_are_kept_at_every_boundary_of_blocks(weights, seed, block):
    stream = make_stream(mixture([[10]] * len(weights), weights), seed)
    before = [0] * len(weights)
    # Weights are halved again and again, and each time rounded: half a row at most, and inside a half its share of it.
    most_off = Fraction((len(weights) - 1).bit_length(), 2)
    for blocks in (1, block, block + 1):
        counts = stream.counts(blocks * MIX_BLOCK)
        assert sum(counts) == blocks * MIX_BLOCK
        for count, weight in zip(counts, weights, strict=True):
            exact = Fraction(weight) / sum(map(Fraction, weights)) * blocks * MIX_BLOCK
            assert abs(count - exact) <= most_off <= (1 if len(weights) <= 4 else 2)
        assert all(now >= then for now, then in zip(counts, before, strict=True)), "rows were taken back"
        before = counts


@pytest.mark.parametrize("weights", [[1.0, 7.0, 0.001953125, 0.5], [1, 1e-9, 1], [1e9, 1, 1e-9, 1, 1e9]])
def test_a_source_of_a_tiny_weight_disturbs_no_other(weights):
    # Its share of a block is less than a row: rounded between its neighbours' bounds it came out as -1 now and then.
    stream = make_stream(mixture([[10]] * len(weights), weights), 0)
    drawn = [0] * len(weights)
    for position in range(20 * MIX_BLOCK):
        drawn[stream.row(position)[0].shard] += 1
    assert stream.counts(20 * MIX_BLOCK) == drawn
    for count, weight in zip(drawn, weights, strict=True):
        assert abs(count - weight / sum(weights) * 20 * MIX_BLOCK) <= 1.5


@examples
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4), seeds, st.integers(0, 10**6))
def test_counts_are_those_of_the_rows_drawn(weights, seed, position):
    stream = make_stream(mixture([[10]] * len(weights), weights), seed)
    before, after = stream.counts(position), stream.counts(position + 100)
    drawn = Counter(stream.row(position + i)[0].shard for i in range(100))
    assert [b - a for a, b in zip(before, after, strict=True)] == [drawn[n] for n in range(len(weights))]


def test_a_block_mixes_its_sources():
    # Weights 3 : 1 give 768 and 256 rows of 1,024. Of 32 rows drawn at random 24 are of the first source, with a
    # deviation of sqrt(32 * 3/4 * 1/4) = 2.4; five deviations on either side are 12.
    stream = make_stream(mixture([[50], [50]], [3, 1]), 0)
    assert stream.counts(MIX_BLOCK) == [768, 256]
    found = [sum(stream.row(start + i)[0].shard == 0 for i in range(32)) for start in range(0, MIX_BLOCK, 32)]
    assert all(count >= 12 for count in found)
    assert len(set(found)) > 3


def test_the_mixture_is_the_recorded_one():
    # A run that resumes under another version of this code must find the same rows: these values are for ever.
    stream = make_stream(mixture([[5, 3], [4]], [2, 1]), 42)
    recorded = [(1, 2), (2, 2), (0, 4), (0, 1), (0, 2), (1, 0), (1, 1), (0, 0), (0, 3), (1, 1), (0, 4), (0, 2)]
    assert [(slot.shard, slot.sample) for slot in samples_of(stream, 1020, 1032)] == recorded
    assert stream.counts(1024) == [683, 341]  # 2/3 and 1/3 of 1,024: 682.7 and 341.3


@examples
@given(mixtures, seeds, st.booleans())
def test_without_weights_sources_are_one(parts, seed, packed):
    # An epoch has every sample of all sources once, as if all shards were of one source.
    sources = mixture(parts, None)
    whole = [NamedSource("whole", [shard for source in sources for shard in source.shards])]
    stream, expected = stream_of(sources, seed, packed), stream_of(whole, seed, packed)
    size = stream.sources[0].order.epoch_size
    assert [stream.row(i) for i in range(2 * size)] == [expected.row(i) for i in range(2 * size)]
    assert Counter(samples_of(stream, 0, size)) == slots(whole[0].shards)


def test_one_weighted_source_is_as_without_a_weight():
    weighted, plain = (make_stream(mixture([[5, 9]], weights), 3) for weights in ([7.5], None))
    assert samples_of(weighted, 0, 100) == samples_of(plain, 0, 100)


def test_a_source_keeps_its_order_whatever_the_others_weigh():
    # To change a weight is to change how often a source comes, not what it gives.
    orders = []
    for weights in ([1, 1], [9, 1]):
        stream = make_stream(mixture([[20], [20]], weights), 5)
        drawn = [slot for slot in samples_of(stream, 0, 400) if slot.shard == 1]
        orders.append(drawn[:30])
    assert orders[0] == orders[1]


# --- What is refused, and what a checkpoint remembers ---


def test_sources_without_a_sample_are_refused():
    with pytest.raises(DataError, match="^the shards hold no sample$"):
        make_stream(mixture([[0, 0]], None), 0)
    with pytest.raises(DataError, match="^the shards of source 's1' hold no sample$"):
        make_stream(mixture([[3], [0]], [1, 1]), 0)
    # Without weights, one empty source is no harm.
    assert len(samples_of(make_stream(mixture([[3], [0]], None), 0), 0, 3)) == 3


def test_shards_of_the_same_samples_are_named_both():
    one, two = Shard(Path("a.tar"), 3, "d", 0, 0), Shard(Path("b.tar"), 3, "d", 0, 0)
    with pytest.raises(DataError, match=r"^a\.tar and b\.tar hold the same samples; leave one of them out$"):
        check_distinct([one, shards_of([4])[0], two])
    check_distinct([Shard(Path("a.tar"), 0, "d", 0, 0), Shard(Path("b.tar"), 0, "d", 0, 0)])  # of nothing, nothing


def test_every_change_of_the_stream_changes_its_description():
    sources = mixture([[3], [3]], [1, 2])
    lengths, others = NumberedLengths([]), NumberedLengths([])
    others.fingerprint = "of another vocabulary"
    renamed = [sources[0], NamedSource("other", sources[1].shards, 2)]
    descriptions = [
        describe(mixture([[3], [3]], None), None, 100), describe(mixture([[3], [3]], None), lengths, 100),
        describe(mixture([[3], [3]], None), lengths, 200), describe(mixture([[3], [3]], None), others, 100),
        describe(sources, None, 100), describe(sources, lengths, 100),
        describe(mixture([[3], [3]], [1, 3]), None, 100), describe(renamed, None, 100),
    ]  # fmt: skip
    assert len(set(descriptions)) == len(descriptions)
    # The same shards, one of them in the other source; and weights that differ in the eighth place.
    assert describe(mixture([[3, 3], [3]], [1, 2]), None, 100) != describe(mixture([[3], [3, 3]], [1, 2]), None, 100)
    weights = ([1, 0.3333333], [1, 0.33333334])
    assert len({describe(mixture([[3], [3]], pair), None, 100) for pair in weights}) == 2
    # Where samples are not packed, the length they are cut at is no matter of order.
    assert describe(sources, None, 100) == describe(sources, None, 200)


def test_shards_at_a_time_are_those_of_two_windows_of_every_part(monkeypatch):
    monkeypatch.setattr(packing, "GROUP_SAMPLES", 1000)
    # A window is of 16 units. Plain: 2 x 16 of 100 shards, and both of 2.
    assert shards_at_a_time(mixture([[5] * 100], None), packing=False) == 32
    assert shards_at_a_time(mixture([[5] * 2], None), packing=False) == 2
    # Weighted sources have windows of their own, others share one.
    assert shards_at_a_time(mixture([[5] * 100] * 3, [1, 1, 1]), packing=False) == 96
    assert shards_at_a_time(mixture([[5] * 100] * 3, None), packing=False) == 32
    # Packed, a unit is a group of shards with 1,000 samples: of 10 shards of 100, 32 groups have 320.
    assert shards_at_a_time(mixture([[100] * 1000], None), packing=True) == 320


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_never_leaves_the_shards_at_a_time(packing):
    # Any stretch of two epochs as long as the shortest window: the shards in it are no more than was said.
    sources = mixture([[400] * 60, [700] * 50], [2, 1])
    lengths = NumberedLengths([shard for source in sources for shard in source.shards])
    stream = make_stream(sources, 3, lengths if packing else None, MAX_LENGTH)
    most = shards_at_a_time(sources, packing)
    for start in range(0, 20_000, 500):
        rows = [stream.row(position) for position in range(start, start + 500)]
        assert len({slot.shard for row in rows for slot in row}) <= most
