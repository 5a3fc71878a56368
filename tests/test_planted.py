"""Data is never code: what is planted in a configuration, a shard or a kept index runs nothing."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from trainer.config import Config
from trainer.data.index import open_index
from trainer.data.kept import kept_files
from trainer.data.order import Slot
from trainer.data.reader import ShardReader
from trainer.data.writer import ShardWriter
from trainer.errors import ConfigError


class Planted:
    """A pickle that, when it is loaded, writes a file."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return exec, (f"open({self.file!r}, 'w').close()",)


@pytest.fixture
def sign(tmp_path) -> Path:
    """A file that is there once planted code has run; first it is shown that it would."""
    file = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Planted(file)))
    assert file.exists()
    file.unlink()
    return file


TAGS = [
    "!!python/object/apply:builtins.open ['{sign}', 'w']",
    "!!python/object/new:builtins.open ['{sign}', 'w']",
    "!!python/name:builtins.exec",
]


@pytest.mark.parametrize("tag", TAGS)
def test_a_configuration_makes_no_objects(tiny_run, tmp_path, sign, tag, fault):
    planted = tag.format(sign=sign)
    file = tmp_path / "planted.yaml"
    file.write_text(tiny_run.read_text() + f"\nfreeze: {planted}\n")
    with pytest.raises(ConfigError, match="not YAML"):
        Config.load(file)
    with pytest.raises(ConfigError, match="the value is not YAML"):
        Config.load(tiny_run, [f"run.name={planted}"])
    assert not sign.exists()
    fault(f"{tag.split()[0]} in a configuration", "refused, not run", equal="-")


def test_a_shard_is_read_without_unpickling(tmp_path, sign, fault):
    # webdataset's own reader unpickles members of these names.
    code = pickle.dumps(Planted(sign))
    tar = tmp_path / "planted.tar"
    with tarfile.open(tar, "w") as archive:
        members = {
            "a.json": b'{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}',
            "a.pyd": code, "a.pickle": code, "a.pth": code, "a.npy": code, "b.json": code, "b.cls": b"1",
        }  # fmt: skip
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    index = open_index(tar)
    reader = ShardReader([index.shard])
    assert [turn.text for turn in reader.conversation(Slot(0, 0))] == ["Q", "A"]
    with pytest.raises(Exception, match="is not JSON"):
        reader.conversation(Slot(0, 1))
    assert not sign.exists()
    fault("a pickle in a shard", "not run", equal="-")


def test_a_kept_index_is_read_without_unpickling(tmp_path, sign):
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write("a", {"txt": "A cat."})
    (tar,) = writer.shards
    whole = open_index(tar)
    kept = kept_files(tar, "index")[0]
    with np.load(kept) as stored:
        arrays = dict(stored)
    planted = np.empty(1, dtype=object)
    planted[0] = Planted(sign)
    np.savez(kept, **{**arrays, "key_bytes": planted})  # type: ignore[arg-type]
    assert open_index(tar).key(0) == whole.key(0) == "a"  # made anew
    assert not sign.exists()
