"""`img2dataset`: the tars that it downloads into (output format "webdataset"), sharded anew without what is bad.

00000.tar: 000000000.jpg, 000000000.txt, 000000000.json {"caption": ..., "url": ..., "key": "000000000",
           "status": "success", "error_message": null, "width": 256, ..., "exif": "{}", "sha256": "..."}
00000.parquet, 00000_stats.json: beside it, not needed
"""

import glob
import hashlib
import json
import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from trainer.data.index import ShardIndex, open_index
from trainer.data.parallel import in_processes
from trainer.data.sources.conversations import checked_text
from trainer.data.sources.pictures import bytes_as_picture
from trainer.data.sources.source import MALFORMED_ENTRY, NO_CAPTION, SourceRecord, entry_name, make_key, naming
from trainer.errors import BadSample, DataError

FAILED_DOWNLOAD = "download failed"


class Img2datasetSource:
    """The samples of all tars of a folder, or of those that a pattern finds, in the order of their names."""

    def __init__(self, pattern: str):
        found = glob.glob(os.path.join(glob.escape(pattern), "*.tar") if os.path.isdir(pattern) else pattern)
        self.tars = sorted(Path(tar) for tar in found)
        if not self.tars:
            raise DataError(
                f"{pattern}: no tars there; expected the output folder of img2dataset, or a pattern (*.tar)"
            )
        self._ends = list(accumulate(in_processes(_samples, self.tars, "reading the tars")))
        self._open: ShardIndex | None = None

    def __len__(self) -> int:
        return self._ends[-1]

    def fingerprint(self) -> dict[str, Any]:
        stats = [[str(tar.resolve()), tar.stat().st_size, tar.stat().st_mtime_ns] for tar in self.tars]
        return {"tars": len(stats), "sha256": hashlib.sha256(json.dumps(stats).encode()).hexdigest()}

    def record(self, number: int) -> SourceRecord:
        position = bisect_right(self._ends, number)
        tar, sample = self.tars[position], number - (self._ends[position - 1] if position else 0)
        index = self._index(tar)
        with naming(f"{tar}: sample {index.key(sample)}"):
            name = entry_name(number, index.key(sample))
            pictures, caption, record = _read(tar, index, sample)
            if record.get("status", "success") != "success":
                reason = record.get("error_message")
                raise BadSample(f"status {record['status']!r} ({reason})", FAILED_DOWNLOAD)
            caption = record["caption"] if record.get("caption") is not None else caption
            if caption is None:
                raise BadSample("neither its .json nor a .txt has a caption", NO_CAPTION)
            if len(pictures) != 1:
                raise BadSample(f"expected one picture, found {len(pictures)}", MALFORMED_ENTRY)
            text = {"id": name, **checked_text({"caption": caption}, 1)}
            extension, content = bytes_as_picture(pictures[0], "its picture")
            return SourceRecord(make_key(number, name), {extension: content, "json": text})

    def _index(self, tar: Path) -> ShardIndex:
        # Entries are read in order: one tar's index at a time is enough.
        if self._open is None or self._open.shard.path != tar:
            self._open = open_index(tar)
        return self._open


def _samples(tar: Path) -> int:
    return len(open_index(tar))


def _read(tar: Path, index: ShardIndex, sample: int) -> tuple[list[bytes], str | None, dict[str, Any]]:
    """(pictures, text of the .txt, content of the .json) of one sample."""
    pictures: list[bytes] = []
    caption, record = None, {}
    rows = index.members(sample)
    columns = (index.is_image[rows], index.is_json[rows], index.offset[rows], index.size[rows])
    for is_image, is_json, offset, size in zip(*(column.tolist() for column in columns), strict=True):
        content = _bytes(tar, offset, size)
        if is_image:
            pictures.append(content)
        elif is_json:
            record = _parse(content)
        else:
            caption = content.decode(errors="replace")
    return pictures, caption, record


def _bytes(tar: Path, offset: int, size: int) -> bytes:
    try:
        with tar.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise DataError(f"{tar}: cannot be read ({error.strerror})") from error


def _parse(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its .json is not JSON ({error})", MALFORMED_ENTRY) from error
    if not isinstance(record, dict):
        raise BadSample(f"its .json holds a {type(record).__name__}, not an object", MALFORMED_ENTRY)
    return record
