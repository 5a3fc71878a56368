"""Training from https://: the curve of local shards, through a cache that stays small, and never from other data."""

import json
import shutil
from pathlib import Path

import pytest
from ranks import script

from trainer.data.index import open_index
from trainer.errors import EXIT_USER_ERROR

NAMES = [f"tiny-{number}-000000.tar" for number in range(4)]


@pytest.fixture
def train(tiny_run, tmp_path, server, certificate):
    """Runs launch/train.py on one process; what it said, and the lines of its metrics."""
    shards = tmp_path / "served"
    shards.mkdir()
    for name in NAMES:
        shutil.copy(tiny_run.parent / "shards" / name, shards)
        server.files[f"/{name}"] = (shards / name).read_bytes()
    # Of two shards the index lies beside them, the others' is made of their copies.
    for name in NAMES[:2]:
        open_index(shards / name)
        server.files[f"/{name}.index.npz"] = (shards / f"{name}.index.npz").read_bytes()

    def train(source: str, *settings: str, name: str = "run") -> tuple[str, int, list[dict]]:
        done = script(
            "launch/train.py", "--config", str(tiny_run), "--set", f"run.output_dir={tmp_path}/{name}",
            f"data.train=[{{name: tiny, shards: {source}}}]", f"data.cache_dir={tmp_path}/cache",
            "logging.sample_keys=true", "train.max_steps=5", *settings,
            timeout=200, SSL_CERT_FILE=str(certificate), XDG_CACHE_HOME=str(tmp_path / "indexes"),
            NO_PROXY="127.0.0.1",
        )  # fmt: skip
        file = tmp_path / name / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return done.stderr, done.returncode, lines

    return train


def test_the_curve_is_that_of_local_shards(train, server, tmp_path):
    remote = f"'{server.url}/tiny-{{0..3}}-000000.tar?token=secret'"
    packed = ("data.packing=true", "train.global_batch_size=2")
    said, code, lines = train(remote, *packed)
    assert code == 0, said
    _, _, expected = train(f"'{tmp_path}/served/*.tar'", *packed, name="local")
    assert len(lines) == len(expected) == 5
    for line, local in zip(lines, expected, strict=True):
        assert line["samples"] == local["samples"]
        assert line["loss"] == pytest.approx(local["loss"], rel=1e-6)
    # Every shard was fetched once for all processes; those with an index were not fetched to be indexed.
    assert [server.requests["GET", f"/{name}?token=secret"] for name in NAMES] == [1] * 4
    # The token stands in no file of the run but the configuration, which needs it to go on.
    texts = [
        file for file in (tmp_path / "run").rglob("*") if file.suffix in (".json", ".jsonl") and "hf" not in str(file)
    ]
    assert texts
    assert not any("secret" in file.read_text() for file in texts)


def test_a_shard_that_changed_at_its_source_is_refused_by_name(train, server, tmp_path):
    said, code, _ = train(f"'{server.url}/{NAMES[1]}'", "train.global_batch_size=2")
    assert code == 0, said
    # Same size, same address, other members; the copy has made room meanwhile.
    shutil.rmtree(tmp_path / "cache")
    content = server.files[f"/{NAMES[1]}"]
    key = Path(NAMES[1]).stem.split("-")[1]
    server.files[f"/{NAMES[1]}"] = _renamed(content, f"s{key}-1.".encode(), f"s{key}-9.".encode())
    said, code, _ = train(f"'{server.url}/{NAMES[1]}'", "train.global_batch_size=2", "train.max_steps=8")
    assert code == EXIT_USER_ERROR
    assert f"{server.url}/{NAMES[1]}: the shard is not the one that its index was made of" in said


def _renamed(tar: bytes, old: bytes, new: bytes) -> bytes:
    """A tar whose members have other names, with the headers' checksums mended."""
    blocks = [bytearray(tar[start : start + 512]) for start in range(0, len(tar), 512)]
    for block in blocks:
        if block.startswith(old):
            block[: len(new)] = new
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def test_a_cache_too_small_is_refused_before_a_step(train, server):
    # The two that have to be fetched for their indexes fit, all four do not.
    limit = 1.1 * sum(sorted(map(len, server.files.values()))[-2:]) / 2**30
    said, code, lines = train(f"'{server.url}/tiny-{{0..3}}-000000.tar'", f"data.cache_gib={limit}")
    assert code == EXIT_USER_ERROR
    assert f"data.cache_gib={limit:.3g} is too small: up to 4 of the 4 remote shards are needed at a time" in said
    assert not lines


def test_other_schemes_are_refused_with_the_other_mistakes(train):
    urls = ["pipe:cat x.tar", "http://host/x.tar", "gs://bucket/x.tar", "simplecache::s3://b/x.tar"]
    said, code, _ = train(json.dumps(urls), "train.global_batch_size=0")
    assert code == EXIT_USER_ERROR
    for url in urls:
        assert f"data.train[0].shards: '{url}': shards are local paths or s3://, https://, hf://" in said
    assert "train.global_batch_size: must be at least 1" in said
