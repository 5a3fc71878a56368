"""Folders that cannot be written to, and full disks: an index lies elsewhere, or the error names both places."""

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pairs import dataset_of, make_template, members_of, opened, read, write_pairs, write_tar

from trainer.data.template import ChatTemplate
from trainer.errors import DataError

SAMPLES = 6


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> ChatTemplate:
    return make_template(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder for indexes that cannot lie beside their tar, kept away from the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@pytest.fixture
def mounted() -> Iterator[Callable[..., Path]]:
    """Mounts file systems, and takes them away again."""
    done: list[Path] = []

    def mount(folder: Path, *options: str) -> Path:
        folder.mkdir(exist_ok=True)
        result = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"no right to mount: {result.stderr}")
        done.append(folder)
        return folder

    yield mount
    for folder in reversed(done):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@needs_root
def test_shards_on_a_read_only_file_system_have_their_index_in_the_cache(tmp_path, template, cache, mounted):
    write_pairs(tmp_path / "t0.tar", SAMPLES)
    tars = mounted(tmp_path / "mounted", "--bind", str(tmp_path))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(tars)], check=True)
    for _ in range(2):
        keys, rejected = read(opened(tars, template))
        assert (len(keys), rejected) == (SAMPLES, [])
    assert [file.name.split("-")[0] for file in (cache / "mqwen-trainer" / "index").iterdir()] == ["t0"]
    assert list(tmp_path.glob("*.npz")) == []


@needs_root
def test_a_full_disk_is_named_with_the_way_out(tmp_path, template, mounted, monkeypatch):
    # A file system of 64 KiB with a tar of 20 on it, and a cache of as many on another: an index of 3,000 samples takes
    # 3,000 x (8 + 8 + 2 x 26) bytes = 200 KiB.
    samples = {f"{i:05d}": {"png": b"", "txt": b""} for i in range(3000)}
    tars, cache = (mounted(tmp_path / name, "-t", "tmpfs", "-o", f"size={size}", "none") for name, size in
                   (("tars", "3500k"), ("small", "64k")))  # fmt: skip
    tar = write_tar(tars / "t0.tar", members_of(samples), tarfile.USTAR_FORMAT)
    (tars / "rest").write_bytes(bytes(os.statvfs(tars).f_bavail * os.statvfs(tars).f_frsize - 8192))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with pytest.raises(DataError) as raised:
        opened(tars, template)
    said = str(raised.value)
    assert said.startswith(f"{tar}: its index cannot be kept: neither in {tars} (No space left on device")
    assert f"nor in {cache}/mqwen-trainer/index (No space left on device" in said
    assert "make room, or name a folder in XDG_CACHE_HOME" in said
    # Nothing half written is left to be taken for an index, or to fill the disk for good.
    assert not [file for folder in (tars, cache) for file in folder.rglob("*.npz")]
    # Room in one of the two is enough.
    (tars / "rest").unlink()
    assert len(opened(tars, template).reader.shards[0]) == 3000


def test_a_file_limit_is_named_as_a_full_disk_is(tmp_path):
    # For those who may not mount: a process that may not write more than 1 KiB into a file.
    write_pairs(tmp_path / "t0.tar", 300)
    code = (
        "import resource, signal, sys; from pathlib import Path; from trainer.data.index import open_index\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "open_index(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "t0.tar")], capture_output=True, text=True, check=False
    )
    assert (
        f"DataError: {tmp_path}/t0.tar: its index cannot be kept: neither in {tmp_path} (File too large" in done.stderr
    )
    assert list(tmp_path.rglob("*.npz")) == []


@pytest.mark.parametrize("home", ["/dev/null", "/proc/none"])
def test_no_place_for_an_index_names_both_places(tmp_path, template, monkeypatch, home):
    # The folder of the tar cannot be written to by anyone, root included: /proc/self/fd.
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    with write_pairs(tmp_path / "t0.tar", SAMPLES).open("rb") as file:
        tar = Path(f"/proc/self/fd/{file.fileno()}")
        with pytest.raises(DataError) as raised:
            dataset_of([tar], template)
    assert str(raised.value).startswith(f"{tar}: its index cannot be kept: neither in /proc/self/fd (")
    assert f" nor in {home}/mqwen-trainer/index (" in str(raised.value)
