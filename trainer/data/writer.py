"""Samples -> WebDataset tars. A shard appears under its name only when it is whole."""

import json
from pathlib import Path
from types import TracebackType

import webdataset


class ShardWriter:
    """Writes `PREFIX-000000.tar`, ... of at most `samples_per_shard` samples into a folder.

        with ShardWriter(folder) as writer:
            writer.write("00000000", {"jpg": b"...", "json": {...}})

    Members carry no time and no owner: the same samples give the same bytes.
    """

    def __init__(self, folder: Path, prefix: str = "shard", samples_per_shard: int = 1000):
        self.folder = folder
        self.prefix = prefix
        self.samples_per_shard = samples_per_shard
        self.shards: list[Path] = []
        self.samples = 0
        self._tar: webdataset.TarWriter | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def _partial(self) -> Path:
        return self.folder / f".{self.prefix}-{len(self.shards):06d}.tar.tmp"

    def write(self, key: str, members: dict[str, bytes | str | dict]) -> None:
        """Adds a sample. members: extension ("jpg", "0.png", "json", "txt") -> content; dicts are stored as JSON."""
        if self._tar is None:
            self._tar = webdataset.TarWriter(str(self._partial), encoder=False, mtime=0, user="", group="")
        encoded = {
            extension: json.dumps(content, ensure_ascii=False).encode() if isinstance(content, dict)
            else content.encode() if isinstance(content, str) else content
            for extension, content in members.items()
        }  # fmt: skip
        self._tar.write({"__key__": key, **encoded})
        self.samples += 1
        if self.samples % self.samples_per_shard == 0:
            self._finish()

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        partial, shard = self._partial, self.folder / f"{self.prefix}-{len(self.shards):06d}.tar"
        partial.replace(shard)
        self.shards.append(shard)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self._finish()
        elif self._tar is not None:
            self._tar.close()
            self._partial.unlink(missing_ok=True)
