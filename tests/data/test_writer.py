"""The writer: the same bytes each time, and a shard is whole or not there. webdataset itself reads them back."""

import io
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from trainer.data.index import open_index
from trainer.data.writer import ShardWriter

FORK = multiprocessing.get_context("fork")


def picture(colour: str = "red", form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, form)
    return buffer.getvalue()


def read_by_webdataset(shards: list[Path]) -> list[dict]:
    samples = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False))
    return [
        {key: value for key, value in sample.items() if key not in ("__url__", "__local_path__")} for sample in samples
    ]


SAMPLES = {
    f"s{i}": {"png": picture("red"), "json": {"n": i, "text": "图像 é 🙂"}}
    if i % 2
    else {"0.png": picture("red"), "1.jpg": picture("blue", "JPEG"), "txt": f"Pictures {i}: 图像"}
    for i in range(7)
}


def write(folder: Path, samples: dict[str, dict] = SAMPLES, samples_per_shard: int = 3) -> list[Path]:
    with ShardWriter(folder, "cats", samples_per_shard) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    assert writer.samples == len(samples)
    return writer.shards


def test_the_same_samples_give_the_same_bytes(tmp_path, monkeypatch):
    first = write(tmp_path / "first")
    monkeypatch.setenv("USER", "somebody-else")
    second = write(tmp_path / "second")
    # 7 samples, 3 a shard: 3, 3 and 1.
    assert [shard.name for shard in first] == ["cats-000000.tar", "cats-000001.tar", "cats-000002.tar"]
    assert [shard.name for shard in second] == [shard.name for shard in first]
    assert [shard.read_bytes() for shard in second] == [shard.read_bytes() for shard in first]
    assert [len(open_index(shard)) for shard in first] == [3, 3, 1]


def test_webdataset_reads_what_was_written(tmp_path):
    found = read_by_webdataset(write(tmp_path))
    assert [sample.pop("__key__") for sample in found] == list(SAMPLES)
    for sample, written in zip(found, SAMPLES.values(), strict=True):
        assert set(sample) == set(written)
        for extension, content in written.items():
            if extension == "json":
                assert json.loads(sample[extension]) == content
            else:
                assert sample[extension] == (content.encode() if isinstance(content, str) else content)


def test_a_full_last_shard_is_not_followed_by_an_empty_one(tmp_path):
    assert len(write(tmp_path, dict(list(SAMPLES.items())[:6]))) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cats-000000.tar", "cats-000001.tar"]


def test_without_samples_there_is_no_shard(tmp_path):
    assert write(tmp_path, {}) == []
    assert list(tmp_path.iterdir()) == []


def test_a_shard_appears_only_when_it_is_whole(tmp_path):
    seen = []

    def breaking() -> Iterator[tuple[str, dict]]:
        for number, sample in enumerate(SAMPLES.items()):
            if number == 5:
                raise RuntimeError("the source broke")
            yield sample
            seen.append(len(list(tmp_path.glob("*.tar"))))

    def write_all() -> None:
        with ShardWriter(tmp_path, "cats", 3) as writer:
            for key, members in breaking():
                writer.write(key, members)

    with pytest.raises(RuntimeError, match="the source broke"):
        write_all()
    # s0, s1: none is whole; s2 completes the first shard; s3, s4 are in one that never becomes whole.
    assert seen == [0, 0, 1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["cats-000000.tar"]
    assert [sample["__key__"] for sample in read_by_webdataset([tmp_path / "cats-000000.tar"])] == ["s0", "s1", "s2"]


def _write_and_die(folder: Path) -> None:
    writer = ShardWriter(folder, samples_per_shard=2)
    for key in "abc":
        writer.write(key, {"txt": key * 100_000})
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_no_shard_but_whole_ones(tmp_path):
    process = FORK.Process(target=_write_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [shard.name for shard in tmp_path.glob("*.tar")] == ["shard-000000.tar"]
    assert len(open_index(tmp_path / "shard-000000.tar")) == 2
    # What it was writing lies under a name that no glob for shards finds, and is written over by the next try.
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for key in "abc":
            writer.write(key, {"txt": key})
    assert not list(tmp_path.glob(".*.tmp"))
