"""The order of samples: every sample once an epoch, one stream for all geometries, found without walking.

The references are plain Python: Counters of what must be there, and SplitMix64 in unbounded integers.
"""

import itertools
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pairs import plain_stream

from trainer.data.order import (
    SHARDS_PER_WINDOW,
    Geometry,
    Order,
    Slot,
    Stream,
    global_batch,
    group_by_length,
    hashed,
    micro_batches,
    permutation,
)

WORLD_SIZES = (1, 2, 3, 8)

# Odd sizes, empty shards, fewer shards than ranks, and more shards than two windows hold.
shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=2 * SHARDS_PER_WINDOW + 5).filter(any)
seeds = st.integers(0, 2**64 - 1)
examples = settings(deadline=None, max_examples=60)


def all_slots(sizes: list[int]) -> Counter:
    return Counter(Slot(shard, sample) for shard, size in enumerate(sizes) for sample in range(size))


def walk(stream: Stream, first: int, last: int) -> list[Slot]:
    """The samples of the rows [first, last)."""
    return [slot for position in range(first, last) for slot in stream.row(position)]


def epoch_of(sizes: list[int], seed: int | None, epoch: int) -> list[Slot]:
    return walk(plain_stream(sizes, seed), epoch * sum(sizes), (epoch + 1) * sum(sizes))


# --- Every sample once ---


@examples
@given(shard_sizes, st.none() | seeds, st.integers(0, 10**6))
def test_every_epoch_has_every_sample_once(sizes, seed, epoch):
    for following in (epoch, epoch + 1):
        assert Counter(epoch_of(sizes, seed, following)) == all_slots(sizes)
        first = following * sum(sizes)
        order = Order(sizes, seed)
        assert {order.place(position)[0] for position in (first, first + sum(sizes) - 1)} == {following}


@examples
@given(shard_sizes, st.none() | seeds, st.integers(1, 3), st.integers(0, 5))
def test_fillers_come_exactly_after_the_last_sample(sizes, seed, epochs, cut):
    # The end may lie inside an epoch too: `cut` samples before the last one's end.
    end = max(1, epochs * sum(sizes) - cut)
    endless, ending = plain_stream(sizes, seed), plain_stream(sizes, seed, end)
    assert walk(ending, 0, end) == walk(endless, 0, end)
    assert all(ending.row(position) for position in range(end))
    assert [ending.row(position) for position in range(end, end + 20)] == [[]] * 20
    # What a step counts as seen ends there too.
    assert (ending.counts(end - 1), ending.counts(end), ending.counts(end + 20)) == ([end - 1], [end], [end])


@examples
@given(shard_sizes, seeds, st.sampled_from(WORLD_SIZES), st.integers(1, 3), st.integers(1, 2))
def test_ranks_see_every_sample_of_a_run_once(sizes, seed, world_size, micro, accumulation):
    # The last step is filled up: ceil(samples / global batch) steps hold them all, and nothing else but fillers.
    size = world_size * micro * accumulation
    stream = plain_stream(sizes, seed, end=2 * sum(sizes))
    steps = -(-2 * sum(sizes) // size)
    rows = [
        row
        for rank in range(world_size)
        for batch in micro_batches(stream, Geometry(size, micro, rank, world_size), 0, steps)
        for row in batch.rows
    ]
    assert rows.count([]) == steps * size - 2 * sum(sizes)
    assert Counter(slot for row in rows for slot in row) == all_slots(sizes) + all_slots(sizes)


# --- One stream for all geometries ---


@settings(deadline=None, max_examples=12)
@given(shard_sizes, seeds, st.sampled_from([24, 48]), st.integers(0, 1000))
def test_a_step_has_the_same_samples_in_every_geometry(sizes, seed, size, first):
    # 24 and 48 can be cut for 1, 2, 3 and 8 ranks, and for each of these in several ways.
    last = first + 2
    stream = plain_stream(sizes, seed)
    expected = [global_batch(stream, step, size) for step in range(first, last)]
    tried = 0
    for world_size, micro in itertools.product(WORLD_SIZES, range(1, size + 1)):
        if size % (world_size * micro):
            continue
        tried += 1
        ranks = [
            list(micro_batches(stream, Geometry(size, micro, rank, world_size), first, last))
            for rank in range(world_size)
        ]
        accumulation = size // (world_size * micro)
        assert all(len(batches) == 2 * accumulation for batches in ranks)
        assert all(len(batch.rows) == micro for batches in ranks for batch in batches)
        ends = [False] * (accumulation - 1) + [True]
        assert all([batch.is_last for batch in batches] == 2 * ends for batches in ranks)
        for step, rows in enumerate(expected):
            own = [batches[step * accumulation : (step + 1) * accumulation] for batches in ranks]
            # Read micro-step by micro-step, rank by rank, the global batch is not even reordered.
            assert [row for micro_step in zip(*own, strict=True) for batch in micro_step for row in batch.rows] == rows
    # Divisors of 24, 12, 8 and 3: 8 + 6 + 4 + 2; of 48, 24, 16 and 6: 10 + 8 + 5 + 4.
    assert tried == {24: 20, 48: 27}[size]


@examples
@given(shard_sizes, seeds, st.integers(1, 30))
def test_global_batches_laid_end_to_end_are_the_stream(sizes, seed, size):
    # No seam between steps or epochs, whatever the batch size: a batch is that much of one stream.
    stream = plain_stream(sizes, seed)
    steps = -(-2 * sum(sizes) // size)
    laid = [slot for step in range(steps) for row in global_batch(stream, step, size) for slot in row]
    assert laid == walk(stream, 0, steps * size)


# --- Rows of like length together ---

lengths_of_rows = st.lists(st.integers(0, 300), min_size=1, max_size=60)


@settings(deadline=None, max_examples=200)
@given(lengths_of_rows, st.integers(1, 600), st.sampled_from(WORLD_SIZES))
def test_groups_hold_every_row_once_within_the_budget(lengths, budget, world_size):
    groups = group_by_length(lengths, budget, world_size)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert len(groups) % world_size == 0  # each rank has equally many
    for group in groups:
        # A row that alone is longer than the budget cannot be helped; it stands alone.
        assert len(group) * max((lengths[row] for row in group), default=0) <= budget or len(group) == 1
    # What a rank may lack is a row: never while another has two that it could give.
    empty = sum(not group for group in groups)
    assert not empty or max(map(len, groups)) == 1
    assert empty < world_size


@settings(deadline=None, max_examples=200)
@given(lengths_of_rows, st.integers(1, 600), st.sampled_from(WORLD_SIZES))
def test_no_row_is_longer_than_those_of_the_group_before(lengths, budget, world_size):
    # So groups that run at the same time are of like length, and a rank seldom waits for another.
    groups = [[lengths[row] for row in group] for group in group_by_length(lengths, budget, world_size)]
    laid = [length for group in groups for length in group]
    assert laid == sorted(lengths, reverse=True)


@settings(deadline=None, max_examples=60)
@given(shard_sizes, seeds, st.integers(8, 40), st.integers(20, 400), st.integers(0, 50), st.randoms())
def test_a_step_cut_by_length_has_the_same_samples_in_every_geometry(sizes, seed, size, budget, first, random):
    tokens = {slot: random.randrange(1, 100) for slot in all_slots(sizes)}
    stream = plain_stream(sizes, seed, end=(first + 1) * size + size // 2)  # half of the second step are fillers
    for world_size in WORLD_SIZES:
        ranks = [
            list(
                micro_batches(stream, Geometry(size, 1, rank, world_size, budget), first, first + 2, tokens.__getitem__)
            )
            for rank in range(world_size)
        ]
        # All ranks come to the end of each step with the same micro-batch.
        assert all([b.is_last for b in batches] == [b.is_last for b in ranks[0]] for batches in ranks)
        assert sum(batch.is_last for batch in ranks[0]) == 2
        steps = [[], []]
        for batches in ranks:
            step = 0
            for batch in batches:
                longest = max((sum(map(tokens.__getitem__, row)) for row in batch.rows), default=0)
                assert len(batch.rows) * longest <= budget or len(batch.rows) == 1
                steps[step] += batch.rows
                step += batch.is_last
        for step, rows in enumerate(steps):
            expected = [tuple(row) for row in global_batch(stream, first + step, size)]
            assert Counter(map(tuple, rows)) == Counter(expected)


# --- A pure function ---


@examples
@given(shard_sizes, seeds, st.integers(0, 300))
def test_jumping_equals_walking(sizes, seed, position):
    walked = walk(plain_stream(sizes, seed), 0, position + 1)
    assert plain_stream(sizes, seed).row(position) == [walked[-1]]


@examples
@given(shard_sizes, seeds, st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_what_was_asked_before_changes_nothing(sizes, seed, positions):
    used = Order(sizes, seed)
    assert [used.place(p) for p in positions] == [Order(sizes, seed).place(p) for p in positions]


@examples
@given(shard_sizes, seeds, seeds, st.integers(0, 1000))
def test_epochs_and_seeds_differ(sizes, seed, other, epoch):
    # 15 samples can be ordered in 15! = 1.3e12 ways.
    assume(sum(sizes) >= 15 and seed != other)
    assert epoch_of(sizes, seed, epoch) != epoch_of(sizes, seed, epoch + 1)
    assert epoch_of(sizes, seed, epoch) != epoch_of(sizes, other, epoch)


@examples
@given(shard_sizes)
def test_without_a_seed_the_order_is_the_given_one(sizes):
    assert epoch_of(sizes, None, 0) == epoch_of(sizes, None, 1) == list(all_slots(sizes))


def test_processes_agree_whatever_their_hash_seed():
    code = (
        "from trainer.data.order import Order; order = Order([3, 0, 7, 1] * 9, 5);"
        "print([order.place(position) for position in range(1000, 1200)])"
    )
    order = Order([3, 0, 7, 1] * 9, 5)
    expected = str([order.place(position) for position in range(1000, 1200)])
    for hash_seed in ("0", "1", "4242"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == expected


# --- The generator ---


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator as published (Steele, Lea, Flood 2014; Vigna's splitmix64.c), in unbounded integers."""
    outputs, mask = [], 2**64 - 1
    for i in range(1, count + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def test_the_reference_gives_the_published_numbers():
    # Of seed 0, as in the tests of xoshiro's seeding; of seed 1234567, as on Rosetta Code.
    assert splitmix64(0, 2) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@examples
@given(st.lists(st.integers(-(2**63), 2**64 - 1), max_size=3))
def test_hashes_are_those_of_splitmix64(given_seeds):
    # Each seed in turn is mixed into the state; the state then seeds the numbers.
    state = 0
    for seed in given_seeds:
        state = splitmix64(state ^ (seed % 2**64), 1)[0]
    assert hashed(6, *given_seeds).tolist() == splitmix64(state, 6)


def test_the_stream_is_the_recorded_one():
    # A run that resumes under another version of this code must find the same stream: these values are for ever.
    assert hashed(2).tolist() == [16294208416658607535, 7960286522194355700]
    assert hashed(3, 0, 0).tolist() == [2558736989570252433, 17913671590881668180, 5125111896206277188]
    assert permutation(10, 1, 2).tolist() == [2, 9, 8, 7, 3, 1, 5, 6, 0, 4]
    stream = plain_stream([5, 0, 3, 8] * 10, seed=42)
    # 160 samples an epoch: three of the first epoch's, five of the second's.
    recorded = [(20, 4), (12, 3), (39, 5), (11, 5), (12, 3), (11, 1), (22, 2), (32, 1)]
    assert [(slot.shard, slot.sample) for slot in walk(stream, 157, 165)] == recorded


# --- Mixing and cost ---


def test_a_window_mixes_its_shards():
    # 40 shards of 50: windows of 16, 16 and 8 shards. Of 64 samples drawn from 16 shards, a shard is missing with
    # probability (15/16)^64 = 0.016, so nearly all 16 are in every batch of 64.
    stream = plain_stream([50] * 40, seed=0)
    window = 50 * SHARDS_PER_WINDOW
    first, second = walk(stream, 0, window), walk(stream, window, 2 * window)
    shards = {slot.shard for slot in first}
    assert len(shards) == SHARDS_PER_WINDOW == 16
    assert shards.isdisjoint(slot.shard for slot in second)
    for start in range(0, window - 64, 64):
        assert len({slot.shard for slot in first[start : start + 64]}) >= 13
    # Which shards meet each other changes with the epoch.
    assert shards != {slot.shard for slot in epoch_of([50] * 40, 0, 1)[:window]}


@pytest.mark.parametrize("position", [0, 999_999, 10**6 * 1000 + 999_999])
def test_a_jump_costs_the_same_to_any_step(position):
    # A million samples in a thousand shards; the last position is in the thousand and first epoch.
    start = time.process_time()
    Order([1000] * 1000, seed=3).place(position)
    assert time.process_time() - start < 1
