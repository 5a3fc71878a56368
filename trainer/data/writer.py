"""Samples -> WebDataset tars. A shard appears under its name only when it is whole and on the disk."""

import json
import os
from pathlib import Path
from types import TracebackType

import webdataset


class ShardFile:
    """Writes one tar, under a hidden name until it is whole; without a sample there is none.

        with ShardFile(folder / "cats-000000.tar") as shard:
            shard.write("00000000", {"jpg": b"...", "json": {...}})

    Members carry no time and no owner: the same samples give the same bytes.
    """

    def __init__(self, path: Path):
        self.path = path
        self.samples = 0
        self._partial = path.with_name(f".{path.name}.tmp")
        self._tar: webdataset.TarWriter | None = None

    def write(self, key: str, members: dict[str, bytes | str | dict]) -> None:
        """Adds a sample. members: extension ("jpg", "0.png", "json", "txt") -> content; dicts are stored as JSON."""
        if self._tar is None:
            self._file = self._partial.open("wb")
            self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0, user="", group="")
        encoded = {
            extension: json.dumps(content, ensure_ascii=False).encode() if isinstance(content, dict)
            else content.encode() if isinstance(content, str) else content
            for extension, content in members.items()
        }  # fmt: skip
        self._tar.write({"__key__": key, **encoded})
        self.samples += 1

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.end(error)

    def end(self, error: BaseException | None = None) -> None:
        """Gives the tar its name, or, after an error, removes what there is of it."""
        if self._tar is None:
            return
        try:
            self._tar.close()
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._partial.replace(self.path)
                sync(self.path.parent)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)


class ShardWriter:
    """Writes `PREFIX-000000.tar`, ... of at most `samples_per_shard` samples into a folder, one after another.

    with ShardWriter(folder) as writer:
        writer.write("00000000", {"jpg": b"...", "json": {...}})
    """

    def __init__(self, folder: Path, prefix: str = "shard", samples_per_shard: int = 1000):
        self.folder = folder
        self.prefix = prefix
        self.samples_per_shard = samples_per_shard
        self.shards: list[Path] = []
        self.samples = 0
        self._shard: ShardFile | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, key: str, members: dict[str, bytes | str | dict]) -> None:
        """Adds a sample; as `ShardFile.write`."""
        if self._shard is None:
            self._shard = ShardFile(self.folder / shard_name(self.prefix, len(self.shards)))
        self._shard.write(key, members)
        self.samples += 1
        if self._shard.samples == self.samples_per_shard:
            self._end_shard(None)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end_shard(error)

    def _end_shard(self, error: BaseException | None) -> None:
        if self._shard is None:
            return
        self._shard.end(error)
        if error is None:
            self.shards.append(self._shard.path)
        self._shard = None


def shard_name(prefix: str, number: int) -> str:
    return f"{prefix}-{number:06d}.tar"


def write_whole(file: Path, content: str) -> None:
    """A small text file that is there whole, and on the disk, or not at all."""
    partial = file.with_name(f".{file.name}.tmp")
    with partial.open("w", encoding="utf-8") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    partial.replace(file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Puts a file, or the names in a folder, on the disk: without that a rename may not outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
