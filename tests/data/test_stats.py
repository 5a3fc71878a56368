"""`stats` counts what is there, and its figures for padding and packing are those of a count by hand."""

import os
import re

import numpy as np
import pytest
from inspected import picture, question, run, write, write_by_webdataset, write_nlvr

from trainer.data.index import open_index
from trainer.data.lengths import Lengths
from trainer.data.order import Slot
from trainer.data.plan import NamedSource
from trainer.data.reader import ShardReader
from trainer.data.stats import BINS, Stats, histogram, measure, padded_positions
from trainer.data.template import ChatTemplate
from trainer.errors import DataError
from trainer.models.tokenization_qwen import IMAGE_PLACEHOLDER, build_tokenizer


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(tiny_run):
    return build_tokenizer(tiny_run.parent / "tiny-qwen" / "qwen.tiktoken")


def lengths_of(tars, tokenizer, image_length: int) -> Lengths:
    reader = ShardReader([open_index(tar).shard for tar in tars])
    return Lengths(reader, ChatTemplate(tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER), image_length))


def measured(lengths: Lengths, max_length: int) -> Stats:
    return measure(lengths, [NamedSource("all", list(lengths.reader.shards))], max_length)


CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"


def test_samples_images_and_lengths_are_those_of_the_shards(tmp_path, tokenizer):
    # (images, letters of the answer). The letter q is in no word of the tiny vocabulary, so each is a token.
    kinds = {"a": (1, 1), "b": (2, 20), "c": (0, 300), "d": (1, 5), "e": (1, 5)}
    samples = {
        key: {
            **{f"{n}.png": picture() for n in range(images)},
            "json": question("<image>" * images + "q", "q" * letters),
        }
        for key, (images, letters) in kinds.items()
    }
    stats = measured(lengths_of([write(tmp_path, samples)], tokenizer, image_length=10), max_length=4096)
    frame = len(tokenizer.encode(CHATML.format("q", "")))
    assert stats.images.tolist() == [1, 2, 0, 1, 1]
    assert stats.text_tokens.tolist() == [frame + letters for letters in (1, 20, 300, 5, 5)]
    assert stats.lengths.tolist() == [frame + n for n in (1 + 10, 20 + 20, 300, 5 + 10, 5 + 10)]
    assert (stats.shards, stats.bad, stats.packs) == (1, {}, 1)


def test_what_a_run_would_leave_out_is_counted_by_kind(tmp_path, tokenizer):
    samples = {
        "good": {"png": picture(), "json": question()},
        "header": {"png": b"no picture", "json": question()},
        "json": {"png": picture(), "json": "{"},
        "answer": {"png": picture(), "json": {"messages": [{"role": "user", "content": "?"}]}},
        "crowded": {**{f"{n}.png": picture() for n in range(9)}, "json": question("<image>" * 9)},
        "late": {"png": picture(), "json": question("<image>" + "q" * 300, "Too late to be learnt.")},
        "cut": {"png": picture(), "json": question(answer="q" * 300)},
    }
    tar = write(tmp_path, samples)
    stats = measured(lengths_of([tar], tokenizer, image_length=20), max_length=150)
    assert stats.bad == {
        "picture cannot be decoded": 1,
        "malformed conversation": 1,
        "no answer": 1,
        "images longer than max_length": 1,
        "nothing supervised": 1,
    }
    assert len(stats.images) == 7
    assert len(stats.lengths) == 2
    assert [length > 150 for length in stats.lengths] == [False, True]


def test_padding_by_hand():
    # Every batch is as long as its longest; alone, nobody is padded; all together, everybody is as long as the longest.
    lengths = np.array([3, 9, 4, 4, 7])
    assert padded_positions(lengths, 1) == 27
    assert padded_positions(lengths, 5) == padded_positions(lengths, 100) == 5 * 9
    assert padded_positions(np.full(7, 6), 4) == 42
    # Three long ones among 999 short ones fall into three batches of ten, or fewer if they meet.
    lengths = np.array([1] * 997 + [100] * 3)
    assert padded_positions(lengths, 10) in [1000 + 99 * 10 * batches for batches in (1, 2, 3)]
    assert padded_positions(lengths, 10) == padded_positions(lengths, 10)
    assert padded_positions(np.zeros(0, np.int64), 8) == 0


def test_packs_by_hand(tmp_path, tokenizer):
    # Six samples of the same length: into packs of twice that, three; of one more, as many; of one less, six.
    tar = write(tmp_path, {str(n): {"png": picture(), "json": question()} for n in range(6)})
    lengths = lengths_of([tar], tokenizer, image_length=9)
    (each,) = set(measured(lengths, 4096).lengths.tolist())
    assert [measured(lengths, 2 * each + extra).packs for extra in (0, 1, -1)] == [3, 3, 6]


def test_packs_are_those_of_a_run_source_by_source(tmp_path, tokenizer):
    # One sample of each source: together they fit into one pack, but a source with a weight has packs of its own.
    tars = [write(tmp_path / name, {name: {"png": picture(), "json": question()}}) for name in ("a", "b")]
    lengths = lengths_of(tars, tokenizer, image_length=9)
    shards = lengths.reader.shards
    for weight, packs in ((None, 1), (1.0, 2)):
        sources = [NamedSource(str(number), [shard], weight) for number, shard in enumerate(shards)]
        assert measure(lengths, sources, 4096).packs == packs
    # Kept: a run of the same data finds them.
    assert len(list(tmp_path.rglob("*packs-*"))) == 2  # beside the first shard of each


def test_an_error_leaves_no_file_open(tmp_path, tokenizer, monkeypatch):
    lengths = lengths_of([write(tmp_path, {"a": {"png": picture(), "json": "{"}})], tokenizer, image_length=9)

    def damaged(slot: Slot) -> list:
        lengths.reader.images(slot)
        raise DataError("the shard has changed")

    lengths.build()
    monkeypatch.setattr(lengths.reader, "conversation", damaged)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(DataError, match="has changed"):
        measured(lengths, 4096)
    assert os.listdir("/proc/self/fd") == before


def test_the_histogram_has_every_sample_in_one_bar():
    rng = np.random.default_rng(0)
    for values in ([7], [7, 7, 8], [1, 2, 3, 1000], rng.lognormal(4, 1, 5000).astype(int) + 1):
        lines = histogram(np.array(values)).splitlines()
        rows = [re.fullmatch(r" +([\d,]+) - ([\d,]+) +([\d,]+)( +#+)?", line).groups() for line in lines]
        bounds = [(int(a.replace(",", "")), int(b.replace(",", "")), int(n.replace(",", ""))) for a, b, n, _ in rows]
        assert len(bounds) <= BINS
        for first, last, count in bounds:
            assert count == sum(first <= value <= last for value in values)
        assert sum(count for *_, count in bounds) == len(values)
        assert [last + 1 for _, last, _ in bounds[:-1]] == [first for first, *_ in bounds[1:]]
        assert max(line.count("#") for line in lines) == 48


def test_the_command_on_shards_of_every_writer(tmp_path, tiny_run):
    # tests/conftest.py: of every four samples two have one picture, one has two and one has none; in shards of 7, 5, 1
    # and 11 that is 14 with one, 6 with two (26 pictures) and 4 without.
    code, out, err = run("stats", "--config", tiny_run)
    assert code == 0, err
    assert out.startswith(
        "samples   24 in 4 shards\nimages    26; of a sample: 0 (16.7%), 1 (58.3%), 2 (25.0%)\nleft out  0 (0.00%)"
    )
    # Batches of 2 (the configuration's) are padded less than batches of 24 (all as long as the longest).
    padded = int(re.search(r"padded +([\d,]+)", out)[1].replace(",", ""))
    _, wide, _ = run("stats", "--config", tiny_run, "--micro-batch-size", "24")
    widest = int(re.search(r"padded +([\d,]+)", wide)[1].replace(",", ""))
    longest = int(re.search(r"of a sample: \d+ to (\d+),", out.split("tokens")[1])[1])
    assert widest == 24 * longest
    assert padded < widest
    assert "packing saves" in wide

    theirs = write_by_webdataset(tmp_path / "theirs")
    code, out, err = run("stats", theirs, "--tokenizer", tiny_run.parent / "tiny-qwen")
    assert code == 0, err
    assert out.startswith("samples   10 in 4 shards\nimages    10; of a sample: 1 (100.0%)\nleft out  0 (0.00%)")


def test_the_command_on_real_shards(tmp_path, tiny_run):
    code, out, err = run("stats", write_nlvr(tmp_path, 60), "--tokenizer", tiny_run.parent / "tiny-qwen")
    assert code == 0, err
    assert out.startswith("samples   60 in 3 shards\nimages    60; of a sample: 1 (100.0%)\nleft out  0 (0.00%)")
    counts = [int(count) for count in re.findall(r"^ +\d+ - \d+ +(\d+)", out, re.MULTILINE)]
    assert sum(counts) == 60


def test_no_sample_of_use(tmp_path, tiny_run):
    tar = write(tmp_path, {"a": {"png": picture(), "json": "{"}})
    code, out, err = run("stats", tar, "--tokenizer", tiny_run.parent / "tiny-qwen")
    assert code == 0, err
    assert out.endswith("no sample can be used\n")
    assert run("stats", tar)[0] == 2
    assert run("stats", tmp_path / "absent.tar", "--tokenizer", tiny_run.parent / "tiny-qwen")[0] == 2
