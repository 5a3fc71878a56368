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

from trainer.data.order import (
    FILLER,
    SHARDS_PER_WINDOW,
    Geometry,
    Order,
    Slot,
    global_batch,
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


def stream(order: Order, first: int, last: int) -> list[Slot]:
    return [order.slot(position) for position in range(first, last)]


def epoch_of(order: Order, epoch: int) -> list[Slot]:
    return stream(order, epoch * order.epoch_size, (epoch + 1) * order.epoch_size)


# --- Every sample once ---


@examples
@given(shard_sizes, st.none() | seeds, st.integers(0, 10**6))
def test_every_epoch_has_every_sample_once(sizes, seed, epoch):
    order = Order(sizes, seed)
    for following in (epoch, epoch + 1):
        assert Counter(epoch_of(order, following)) == all_slots(sizes)


@examples
@given(shard_sizes, st.none() | seeds, st.integers(1, 3), st.integers(0, 5))
def test_fillers_come_exactly_after_the_last_sample(sizes, seed, epochs, cut):
    # The end may lie inside an epoch too: `cut` samples before the last one's end.
    end = max(1, epochs * sum(sizes) - cut)
    endless, ending = Order(sizes, seed), Order(sizes, seed, end)
    assert stream(ending, 0, end) == stream(endless, 0, end)
    assert not any(slot.is_filler for slot in stream(ending, 0, end))
    assert stream(ending, end, end + 20) == [FILLER] * 20
    assert FILLER.is_filler


@examples
@given(shard_sizes, seeds, st.sampled_from(WORLD_SIZES), st.integers(1, 3), st.integers(1, 2))
def test_ranks_see_every_sample_of_a_run_once(sizes, seed, world_size, micro, accumulation):
    # The last step is filled up: ceil(samples / global batch) steps hold them all, and nothing else but fillers.
    size = world_size * micro * accumulation
    order = Order(sizes, seed, end=2 * sum(sizes))
    steps = -(-2 * sum(sizes) // size)
    seen = Counter(
        slot
        for rank in range(world_size)
        for batch in micro_batches(order, Geometry(size, micro, rank, world_size), 0, steps)
        for slot in batch
    )
    assert seen.pop(FILLER, 0) == steps * size - 2 * sum(sizes)
    assert seen == all_slots(sizes) + all_slots(sizes)


# --- One stream for all geometries ---


@settings(deadline=None, max_examples=12)
@given(shard_sizes, seeds, st.sampled_from([24, 48]), st.integers(0, 1000))
def test_a_step_has_the_same_samples_in_every_geometry(sizes, seed, size, first):
    # 24 and 48 can be cut for 1, 2, 3 and 8 ranks, and for each of these in several ways.
    last = first + 2
    order = Order(sizes, seed)
    expected = [global_batch(order, step, size) for step in range(first, last)]
    tried = 0
    for world_size, micro in itertools.product(WORLD_SIZES, range(1, size + 1)):
        if size % (world_size * micro):
            continue
        tried += 1
        ranks = [
            list(micro_batches(order, Geometry(size, micro, rank, world_size), first, last))
            for rank in range(world_size)
        ]
        accumulation = size // (world_size * micro)
        assert all(len(batches) == 2 * accumulation for batches in ranks)
        assert all(len(batch) == micro for batches in ranks for batch in batches)
        for step, slots in enumerate(expected):
            own = [batches[step * accumulation : (step + 1) * accumulation] for batches in ranks]
            assert Counter(slot for batches in own for batch in batches for slot in batch) == Counter(slots)
            # Read micro-step by micro-step, rank by rank, the global batch is not even reordered.
            assert [slot for micro_step in zip(*own, strict=True) for batch in micro_step for slot in batch] == slots
    # Divisors of 24, 12, 8 and 3: 8 + 6 + 4 + 2; of 48, 24, 16 and 6: 10 + 8 + 5 + 4.
    assert tried == {24: 20, 48: 27}[size]


@examples
@given(shard_sizes, seeds, st.integers(1, 30))
def test_global_batches_laid_end_to_end_are_the_stream(sizes, seed, size):
    # No seam between steps or epochs, whatever the batch size: a batch is that much of one stream.
    order = Order(sizes, seed)
    steps = -(-2 * order.epoch_size // size)
    laid = [slot for step in range(steps) for slot in global_batch(order, step, size)]
    assert laid == stream(order, 0, steps * size)


# --- A pure function ---


@examples
@given(shard_sizes, seeds, st.integers(0, 300))
def test_jumping_equals_walking(sizes, seed, position):
    walked = stream(Order(sizes, seed), 0, position + 1)
    assert Order(sizes, seed).slot(position) == walked[-1]


@examples
@given(shard_sizes, seeds, st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_what_was_asked_before_changes_nothing(sizes, seed, positions):
    used = Order(sizes, seed)
    assert [used.slot(p) for p in positions] == [Order(sizes, seed).slot(p) for p in positions]


@examples
@given(shard_sizes, seeds, seeds, st.integers(0, 1000))
def test_epochs_and_seeds_differ(sizes, seed, other, epoch):
    # 15 samples can be ordered in 15! = 1.3e12 ways.
    assume(sum(sizes) >= 15 and seed != other)
    order = Order(sizes, seed)
    assert epoch_of(order, epoch) != epoch_of(order, epoch + 1)
    assert epoch_of(order, epoch) != epoch_of(Order(sizes, other), epoch)


@examples
@given(shard_sizes)
def test_without_a_seed_the_order_is_the_given_one(sizes):
    order = Order(sizes, None)
    assert epoch_of(order, 0) == epoch_of(order, 1) == list(all_slots(sizes))


def test_processes_agree_whatever_their_hash_seed():
    code = (
        "from trainer.data.order import Order; order = Order([3, 0, 7, 1] * 9, 5);"
        "print([(s.shard, s.sample) for s in map(order.slot, range(1000, 1200))])"
    )
    order = Order([3, 0, 7, 1] * 9, 5)
    expected = str([(slot.shard, slot.sample) for slot in stream(order, 1000, 1200)])
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
    order = Order([5, 0, 3, 8] * 10, seed=42)
    # 160 samples an epoch: three of the first epoch's, five of the second's.
    recorded = [(20, 4), (12, 3), (39, 5), (11, 5), (12, 3), (11, 1), (22, 2), (32, 1)]
    assert [(slot.shard, slot.sample) for slot in stream(order, 157, 165)] == recorded


# --- Mixing and cost ---


def test_a_window_mixes_its_shards():
    # 40 shards of 50: windows of 16, 16 and 8 shards. Of 64 samples drawn from 16 shards, a shard is missing with
    # probability (15/16)^64 = 0.016, so nearly all 16 are in every batch of 64.
    order = Order([50] * 40, seed=0)
    window = 50 * SHARDS_PER_WINDOW
    first, second = stream(order, 0, window), stream(order, window, 2 * window)
    shards = {slot.shard for slot in first}
    assert len(shards) == SHARDS_PER_WINDOW == 16
    assert shards.isdisjoint(slot.shard for slot in second)
    for start in range(0, window - 64, 64):
        assert len({slot.shard for slot in first[start : start + 64]}) >= 13
    # Which shards meet each other changes with the epoch.
    assert shards != {slot.shard for slot in epoch_of(order, 1)[:window]}


@pytest.mark.parametrize("position", [0, 999_999, 10**6 * 1000 + 999_999])
def test_a_jump_costs_the_same_to_any_step(position):
    # A million samples in a thousand shards; the last position is in the thousand and first epoch.
    start = time.process_time()
    Order([1000] * 1000, seed=3).slot(position)
    assert time.process_time() - start < 1
