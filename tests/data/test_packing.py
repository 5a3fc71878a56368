"""Packs: no longer than allowed, every sample once, as many in every epoch, close to as few as there can be.

The reference is best fit, longest first, as the textbooks have it: one item after another, looking at every bin.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import GROUP_SAMPLES, assign, group_shards, pack_shapes

CAPACITY = 50
# Zeros (samples of no use), lengths that fill a pack, and lengths that are to be cut.
sample_lengths = st.lists(st.integers(0, CAPACITY + 10), max_size=80).map(lambda lengths: np.array(lengths, np.int64))
seeds = st.integers(0, 2**64 - 1)
examples = settings(deadline=None, max_examples=150)


def clipped(lengths: np.ndarray) -> np.ndarray:
    return np.clip(lengths, 1, CAPACITY).astype(int)


def packs_of(lengths: np.ndarray, *given_seeds: int) -> list[list[int]]:
    shapes = pack_shapes(lengths, CAPACITY)
    samples = assign(lengths, shapes, CAPACITY, *given_seeds)
    return [list(map(int, pack)) for pack in np.split(samples, shapes.ends[:-1])] if shapes.count else []


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Packs of lengths: each, longest first, where it leaves the least room; a new one where it fits nowhere."""
    packs: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [pack for pack in packs if sum(pack) + length <= capacity]
        if fitting:
            min(fitting, key=lambda pack: capacity - sum(pack)).append(length)
        else:
            packs.append([length])
    return packs


@examples
@given(sample_lengths, seeds)
def test_every_sample_is_in_one_pack_and_no_pack_is_too_long(lengths, seed):
    packs = packs_of(lengths, seed)
    assert sorted(sample for pack in packs for sample in pack) == list(range(len(lengths)))
    assert all(0 < clipped(lengths)[pack].sum() <= CAPACITY for pack in packs)
    assert all(packs)  # none is empty


@examples
@given(sample_lengths)
def test_packs_are_about_as_full_as_those_of_best_fit(lengths):
    packs = packs_of(lengths, 0)
    assert len(packs) <= 1.1 * len(best_fit(clipped(lengths).tolist(), CAPACITY)) + 1
    # Two packs that are at most half full would have been one.
    fills = [clipped(lengths)[pack].sum() for pack in packs]
    assert sum(2 * fill <= CAPACITY for fill in fills) <= 1


@examples
@given(sample_lengths, seeds, st.randoms())
def test_shapes_depend_on_the_lengths_alone(lengths, seed, random):
    shapes = pack_shapes(lengths, CAPACITY)
    shuffled = lengths.copy()
    random.shuffle(shuffled)
    assert np.array_equal(pack_shapes(shuffled, CAPACITY).lengths, shapes.lengths)
    assert np.array_equal(pack_shapes(shuffled, CAPACITY).ends, shapes.ends)
    # So the packs of any epoch hold the same lengths, and are as many.
    expected = Counter(tuple(sorted(clipped(lengths)[pack])) for pack in packs_of(lengths, seed, 0))
    for epoch in (1, 2):
        found = Counter(tuple(sorted(clipped(lengths)[pack])) for pack in packs_of(lengths, seed, epoch))
        assert found == expected


def test_samples_of_one_length_meet_others_in_every_epoch():
    # 60 samples of 10 tokens, five a pack of 50. Any two share a pack in 4 of 59 epochs: of 12 packs, of C(5, 2) = 10
    # pairs each, about 120 * 4 / 59 = 8 pairs meet again in the next epoch.
    lengths = np.full(60, 10)
    pairs = [
        {(a, b) for pack in packs_of(lengths, 7, epoch) for a in pack for b in pack if a < b} for epoch in range(5)
    ]
    assert all(len(found) == 120 for found in pairs)
    for epoch in range(4):
        assert len(pairs[epoch] & pairs[epoch + 1]) < 30


def test_packs_of_real_lengths_are_nearly_full():
    # A picture of 256 tokens and a text of some 20 to 1,500: a group of shards wastes less than 3 %, padding each of
    # them to the longest would waste more than half, and best fit without a look at pairs some 2 % more.
    rng = np.random.default_rng(0)
    lengths = 256 + np.clip(rng.lognormal(5, 0.8, GROUP_SAMPLES), 20, 1500).astype(int)
    count = pack_shapes(lengths, 2048).count
    assert count < len(best_fit(lengths.tolist(), 2048))
    assert lengths.sum() / (count * 2048) > 0.97


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [CAPACITY], [10**6]])
def test_groups_of_any_size_can_be_packed(lengths):
    # Of no use are samples of length 0; they take a place all the same, so that they are met, and named, once an epoch.
    packs = packs_of(np.array(lengths, dtype=np.int64), 3)
    assert sorted(sample for pack in packs for sample in pack) == list(range(len(lengths)))
    assert len(packs) == min(1, len(lengths))


@examples
@given(st.lists(st.integers(0, 3 * GROUP_SAMPLES), min_size=1, max_size=30))
def test_shards_are_grouped_in_order_until_a_group_has_enough(sizes):
    groups = group_shards(sizes)
    assert [shard for group in groups for shard in group] == list(range(len(sizes)))
    totals = [sum(sizes[shard] for shard in group) for group in groups]
    assert all(total >= GROUP_SAMPLES for total in totals[:-1])
    # No group would have had enough without its last shard.
    assert all(total - sizes[group[-1]] < GROUP_SAMPLES for total, group in zip(totals, groups, strict=True))


def test_the_packs_are_the_recorded_ones():
    # A run that resumes under another version of this code must find the same packs: these values are for ever.
    lengths = np.array([7, 30, 12, 44, 7, 7, 50, 21, 12, 60, 5, 0])
    assert packs_of(lengths, 42, 0, 1) == [[6], [9], [3, 10, 11], [1, 2, 4], [7, 8, 5, 0]]
