"""Ranks, workers, micro-batches, stops and resumes: none of them changes which samples a step has.

First over numbers, where only the order matters; then over real tars, through the loader, picture beside caption.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import P, dataset_of, documents, make_template, write_pairs, write_tar
from test_plan import MAX_LENGTH, NumberedLengths, mixture, slots, stream_of

from trainer.config import Config, DataConfig, RunConfig, ShardsConfig, TrainConfig
from trainer.data import packing
from trainer.data.loader import BatchLoader, ShardDataset
from trainer.data.order import Geometry, Row, Stream, global_batch, micro_batches
from trainer.data.template import ChatTemplate
from trainer.data.transform import ImageTransform
from trainer.open_data import open_cache, open_lengths, open_reader, open_sources, open_stream

WORLD_SIZES = (1, 2, 3, 8)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Packed in groups of at least 12 samples, so that small shards make several."""
    monkeypatch.setattr(packing, "GROUP_SAMPLES", 12)


# --- Over numbers ---


@dataclass(frozen=True)
class Part:
    """What a run does between a start and a stop."""

    steps: int
    world_size: int
    accumulation: int
    by_length: bool = False


parts = st.lists(
    st.builds(Part, st.integers(1, 9), st.sampled_from(WORLD_SIZES), st.sampled_from([1, 2, 4]), st.booleans()),
    min_size=1, max_size=4,
)  # fmt: skip
# Empty shards, odd ones, fewer than there are ranks, and sources of them.
sources_of_sizes = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any), min_size=1, max_size=3)
GLOBAL_BATCH = 96
"""Divided by 1, 2, 3 and 8 ranks, and their share by 1, 2 and 4."""


def steps_of(stream: Stream, part: Part, first: int, lengths: NumberedLengths) -> list[list[Row]]:
    """The rows that all ranks together have of each step."""
    micro = GLOBAL_BATCH // part.world_size // part.accumulation
    budget = 4 * MAX_LENGTH if part.by_length else None
    steps: list[list[Row]] = [[] for _ in range(part.steps)]
    for rank in range(part.world_size):
        geometry = Geometry(GLOBAL_BATCH, micro, rank, part.world_size, budget)
        step = 0
        for batch in micro_batches(stream, geometry, first, first + part.steps, lengths):
            steps[step] += batch.rows
            step += batch.is_last
        assert step == part.steps
    return steps


def as_set(rows: list[Row]) -> Counter:
    return Counter(map(tuple, rows))


@settings(deadline=None, max_examples=60)
@given(sources_of_sizes, st.booleans(), st.booleans(), st.integers(0, 2**63), st.none() | st.integers(1, 300), parts)
def test_stops_and_geometries_leave_the_global_batches_as_they_are(sizes, weighted, packed, seed, end, run):
    weights = [1.0, 2.5, 0.3][: len(sizes)] if weighted else None
    sources = mixture(sizes, weights)
    lengths = NumberedLengths([shard for source in sources for shard in source.shards])

    def start() -> Stream:
        """As every start of a process has it: from the shards alone."""
        stream = stream_of(sources, seed, packed)
        stream.end = end
        return stream

    straight = start()
    step = 0
    for part in run:
        for rows in steps_of(start(), part, step, lengths):
            assert as_set(rows) == as_set(global_batch(straight, step, GLOBAL_BATCH))
            step += 1


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any), st.booleans(), st.integers(0, 2**63), parts)
def test_whatever_the_stops_every_epoch_has_each_sample_once(sizes, packed, seed, run):
    # Rows may come in another order within a step, never in another step; so sort them as the stream has them.
    sources = mixture([sizes], None)
    lengths = NumberedLengths(sources[0].shards)
    straight = stream_of(sources, seed, packed)
    epoch_size = straight.sources[0].order.epoch_size
    seen: list[Counter] = []
    step = 0
    for part in run:
        for rows in steps_of(stream_of(sources, seed, packed), part, step, lengths):
            left = as_set(rows)
            for position in range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH):
                row = straight.row(position)
                left[tuple(row)] -= 1
                epoch = position // epoch_size
                seen += [Counter() for _ in range(epoch + 1 - len(seen))]
                seen[epoch].update(row)
            assert not +left
            assert not -left
            step += 1
    assert all(epoch == slots(sources[0].shards) for epoch in seen[:-1])
    assert seen[-1] <= slots(sources[0].shards)


# --- Over real tars ---


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> ChatTemplate:
    return make_template(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """Five tars of odd sizes, one of them without a sample: 29 samples."""
    folder = tmp_path_factory.mktemp("tars")
    for number, size in enumerate([11, 1, 0, 7, 10]):
        write_pairs(folder / f"t{number}.tar", size)
    write_tar(folder / "t2.tar", [("README", b"")])
    return folder


def config_of(tars: Path, **changes) -> Config:
    """In batches of 24: divided by 1, 2, 3 and 8 ranks."""
    data = {"train": [ShardsConfig("all", f"{tars}/*.tar")], "max_length": 150, "system_prompt": ""}
    train = {"max_steps": 6, "global_batch_size": 24}
    return Config(
        run=RunConfig(seed=5),
        data=DataConfig(**{name: changes.pop(name, value) for name, value in (data | {"packing": False}).items()}),
        train=TrainConfig(**{**train, **changes}),
    )


def run(
    config: Config, template: ChatTemplate, parts: list[tuple[int, int, int]]
) -> list[tuple[list[str], list[list[str]]]]:
    """Keys of every step, sorted, and by rank. parts: (until step, world size, workers), each a start of its own."""
    steps, first = [], 0
    for until, world_size, num_workers in parts:
        by_rank = []
        for rank in range(world_size):
            # What `trainer.train.setup` does on each rank.
            sources = open_sources(config.data.train, open_cache(config.data))
            reader = open_reader(sources, config.data, open_cache(config.data))
            lengths = open_lengths(config, reader, template)
            if lengths is not None and rank == 0:
                lengths.build()
            stream = open_stream(config, sources, lengths)
            micro = config.train.micro_batch_size
            geometry = Geometry(24, micro, rank, world_size, config.train.micro_batch_tokens)
            dataset = ShardDataset(reader, template, ImageTransform(16), config.data.max_length, config.data.packing)
            own: list[list[str]] = [[]]
            for batch in BatchLoader(dataset, micro_batches(stream, geometry, first, until, lengths), num_workers):
                own[-1] += [document.key for document in documents(batch, template)]
                assert not batch["rejected"]
                if batch["is_last"]:
                    own.append([])
            assert own.pop() == []
            by_rank.append(own)
        steps += [(sorted(key for keys in ranks for key in keys), list(ranks)) for ranks in zip(*by_rank, strict=True)]
        first = until
    return steps


STOPS = {
    "two ranks": [(6, 2, 0)],
    "three ranks, two workers": [(6, 3, 2)],
    "eight ranks": [(6, 8, 0)],
    "stopped, on more ranks": [(1, 1, 3), (3, 8, 1), (6, 2, 0)],
    "stopped twice in a step": [(2, 3, 1), (4, 2, 3), (6, 3, 0)],
}
KINDS: dict[str, Callable[[Path], Config]] = {
    "plain": config_of,
    "two epochs": lambda tars: config_of(tars, max_steps=None, epochs=2),
    "by length": lambda tars: config_of(tars, micro_batch_tokens=300),
    "packed": lambda tars: config_of(tars, packing=True),
    "mixed": lambda tars: config_of(
        tars, train=[ShardsConfig("a", f"{tars}/t[013].tar", 3.0), ShardsConfig("b", f"{tars}/t[24].tar", 1.0)]
    ),
    "mixed and packed": lambda tars: config_of(
        tars, packing=True,
        train=[ShardsConfig("a", f"{tars}/t[013].tar", 3.0), ShardsConfig("b", f"{tars}/t[24].tar", 1.0)],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_loaders_of_all_ranks_have_the_samples_of_one(tars, template, kind):
    config = KINDS[kind](tars)
    straight = [keys for keys, _ in run(config, template, [(6, 1, 0)])]
    for name, parts in STOPS.items():
        assert [keys for keys, _ in run(config, template, parts)] == straight, name
    # The samples by themselves, from the names in the tars: 29 an epoch, and 11 + 1 + 7 and 10 of the two sources.
    everything = {f"t{number}-{i}" for number, size in enumerate([11, 1, 0, 7, 10]) for i in range(size)}
    seen = Counter(key for keys in straight for key in keys)
    if kind == "two epochs":
        # 58 samples: steps of 24, 24 and 10, and fillers for the rest.
        assert [len(keys) for keys in straight] == [24, 24, 10, 0, 0, 0]
        assert seen == Counter({key: 2 for key in everything})
        return
    assert seen.keys() == everything
    for source in ("t4-",), ("t0-", "t1-", "t3-"):
        if kind.startswith("mixed"):  # epochs of their own
            counts = {count for key, count in seen.items() if key.startswith(source)}
            assert max(counts) - min(counts) <= 1
    if not kind.startswith("mixed"):
        assert max(seen.values()) - min(seen.values()) <= 1


def test_ranks_share_a_step_evenly(tars, template):
    for _, ranks in run(config_of(tars), template, [(6, 3, 0)]):
        assert [len(keys) for keys in ranks] == [8, 8, 8]


def test_lengths_are_those_of_the_examples(tars, template):
    # What is planned with is what is read: to the token, pictures included, before anything is cut.
    config = config_of(tars, packing=True)
    sources = open_sources(config.data.train, open_cache(config.data))
    reader = open_reader(sources, config.data, open_cache(config.data))
    lengths = open_lengths(config, reader, template)
    lengths.build()
    dataset = dataset_of([shard.path for shard in reader.shards], template, max_length=10**6)
    for slot in slots(reader.shards):
        example = dataset.example(slot)
        assert lengths(slot) == len(example.input_ids)
        assert lengths(slot) > P * len(example.pixel_values)
