"""Slots -> samples: members read from their tars by offset."""

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from trainer.data.conversation import MALFORMED, parse_conversation
from trainer.data.index import MAX_MEMBER_BYTES, Shard, ShardIndex
from trainer.data.order import SHARDS_PER_WINDOW, Slot
from trainer.data.remote import ShardCache
from trainer.data.remote_index import open_any, open_copy
from trainer.data.samples import Turn
from trainer.errors import BadSample, DataError

OPEN_SHARDS = 2 * SHARDS_PER_WINDOW
"""Shards of two windows: two are alive around a window's end."""


class ShardReader:
    """Reads samples of shards. Raises BadSample for one that is of no use, DataError for a shard that is not.

    system_prompt: opens conversations that have no system turn of their own; empty for none.
    caption_prompt: question to which a caption is the answer.
    cache: local copies of remote shards.
    max_open: shards held open, file and index, in each process.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        system_prompt: str = "",
        caption_prompt: str = "Describe the image.",
        cache: ShardCache | None = None,
        max_open: int = OPEN_SHARDS,
    ):
        self.shards = shards
        self.system_prompt = system_prompt
        self.caption_prompt = caption_prompt
        self.cache = cache
        self.max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._index = lru_cache(maxsize=max_open)(self._read_index)

    def key(self, slot: Slot) -> str:
        """From the index alone: the shard need not be here."""
        return self._index(slot.shard).key(slot.sample)

    def images(self, slot: Slot) -> list[bytes]:
        """Encoded pictures of a slot, in the order of their marks."""
        return [content for is_image, _, content in self._members(slot, images=True) if is_image]

    def record(self, slot: Slot) -> tuple[dict, int]:
        """The fields of a slot's .json, with the .txt as `caption` where they have none, and its number of pictures."""
        fields: dict = {}
        images = 0
        members = self._members(slot, images=False)
        texts = [is_json for is_image, is_json, _ in members if not is_image]
        if len(texts) > len(set(texts)):
            raise BadSample(
                "it has several .txt or .json: a key ends at the first dot, so a.1.txt and a.2.txt are of one sample",
                "several texts",
            )
        for is_image, is_json, content in members:
            if is_image:
                images += 1
            elif is_json:
                fields = fields | _parse_json(content)
            else:
                fields = {"caption": content.decode(errors="replace")} | fields
        return fields, images

    def conversation(self, slot: Slot) -> list[Turn]:
        """The checked turns of a slot."""
        turns = parse_conversation(*self.record(slot), self.caption_prompt)
        if self.system_prompt and turns[0].role != "system":
            turns = [Turn("system", self.system_prompt), *turns]
        return turns

    def close(self) -> None:
        """Closes all files."""
        while self._open:
            os.close(self._open.popitem()[1].file)

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_index(self, number: int) -> ShardIndex:
        shard = self.shards[number]
        index = open_any(shard.place, self.cache)
        if index.shard.digest != shard.digest:
            raise DataError(_changed(shard))
        return index

    def _opened(self, number: int) -> "_OpenShard":
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) == self.max_open:  # before the next one is opened: a remote shard may need its room
            os.close(self._open.popitem(last=False)[1].file)
        shard, index = self.shards[number], self._index(number)
        if shard.url:
            assert self.cache is not None
            file = open_copy(index, self.cache)
        else:
            file = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        stat = os.fstat(file)
        # Of a copy the size has been checked, and its time of change is its own.
        if not shard.url and (stat.st_size, stat.st_mtime_ns) != (index.shard.size, index.shard.mtime_ns):
            os.close(file)
            raise DataError(_changed(shard))
        self._open[number] = _OpenShard(file, index, stat.st_size, stat.st_mtime_ns)
        return self._open[number]

    def _members(self, slot: Slot, images: bool) -> list[tuple[bool, bool, bytes]]:
        """(is_image, is_json, content) of each member; of pictures or of texts the content is left empty."""
        shard = self.shards[slot.shard]
        try:
            opened = self._opened(slot.shard)
            stat = os.fstat(opened.file)
            if (stat.st_size, stat.st_mtime_ns) != (opened.size, opened.mtime_ns):
                raise DataError(_changed(shard))
            index, rows = opened.index, opened.index.members(slot.sample)
            columns = (index.is_image[rows], index.is_json[rows], index.offset[rows], index.size[rows])
            return [
                (is_image, is_json, _read(opened.file, offset, size, shard) if is_image == images else b"")
                for is_image, is_json, offset, size in zip(*(column.tolist() for column in columns), strict=True)
            ]
        except OSError as error:
            raise DataError(f"{shard.name}: the shard cannot be read ({error.strerror})") from error


def _read(file: int, offset: int, size: int, shard: Shard) -> bytes:
    if size > MAX_MEMBER_BYTES:
        raise BadSample(f"a member of {size:,} bytes; at most {MAX_MEMBER_BYTES:,} are read", "member too large")
    content = os.pread(file, size, offset)
    if len(content) != size:
        raise DataError(_changed(shard))
    return content


@dataclass(frozen=True)
class _OpenShard:
    file: int
    index: ShardIndex
    size: int
    mtime_ns: int
    """Of the file when it was opened."""


def _changed(shard: Shard) -> str:
    return (
        f"{shard.name}: the shard has changed since this job looked at it; leave shards alone while a job reads them, "
        f"put the old one back, or start a new run with the new one"
    )


def _parse_json(content: bytes) -> dict:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its .json is not JSON ({error})", MALFORMED) from error
    if not isinstance(record, dict):
        raise BadSample(f"its .json holds a {type(record).__name__} where an object is expected", MALFORMED)
    return {name: value for name, value in record.items() if value is not None}
