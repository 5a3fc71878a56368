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

from trainer.data.index import Shard, open_index
from trainer.data.order import Slot
from trainer.data.parallel import in_processes
from trainer.data.reader import ShardReader
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
        shards = list(in_processes(_shard, self.tars, "reading the tars"))
        self._ends = list(accumulate(map(len, shards)))
        self._reader = ShardReader(shards)

    def __len__(self) -> int:
        return self._ends[-1]

    def fingerprint(self) -> dict[str, Any]:
        stats = [[str(tar.resolve()), tar.stat().st_size, tar.stat().st_mtime_ns] for tar in self.tars]
        return {"tars": len(stats), "sha256": hashlib.sha256(json.dumps(stats).encode()).hexdigest()}

    def record(self, number: int) -> SourceRecord:
        position = bisect_right(self._ends, number)
        slot = Slot(position, number - (self._ends[position - 1] if position else 0))
        key = self._reader.key(slot)
        with naming(f"{self.tars[position]}: sample {key}"):
            name = entry_name(number, key)
            record, _ = self._reader.record(slot)
            pictures = self._reader.images(slot)
            if record.get("status", "success") != "success":
                reason = record.get("error_message")
                raise BadSample(f"status {record['status']!r} ({reason})", FAILED_DOWNLOAD)
            if "caption" not in record:
                raise BadSample("neither its .json nor a .txt has a caption", NO_CAPTION)
            if len(pictures) != 1:
                raise BadSample(f"expected one picture, found {len(pictures)}", MALFORMED_ENTRY)
            text = {"id": name, **checked_text({"caption": record["caption"]}, 1)}
            extension, content = bytes_as_picture(pictures[0], "its picture")
            return SourceRecord(make_key(number, name), {extension: content, "json": text})


def _shard(tar: Path) -> Shard:
    return open_index(tar).shard
