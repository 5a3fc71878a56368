"""Slots -> samples: members read from their tars by offset."""

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.conversation import MALFORMED, parse_conversation
from trainer.data.index import Shard, ShardIndex, open_index
from trainer.data.order import SHARDS_PER_WINDOW, Slot
from trainer.data.remote import ShardCache
from trainer.data.remote_index import open_copy, open_remote
from trainer.data.samples import Sample, Turn
from trainer.errors import BadSample, DataError

OPEN_SHARDS = 2 * SHARDS_PER_WINDOW
"""Shards each process holds open at most, file and index: those of two windows, far below the usual limit of 1,024."""


class ShardReader:
    """Reads samples of shards. Raises BadSample for one that is of no use, DataError for a shard that is not.

    system_prompt: opens conversations that have no system turn of their own; empty for none.
    caption_prompt: question to which a caption is the answer.
    cache: local copies of remote shards.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        system_prompt: str = "",
        caption_prompt: str = "Describe the image.",
        cache: ShardCache | None = None,
    ):
        self.shards = shards
        self.system_prompt = system_prompt
        self.caption_prompt = caption_prompt
        self.cache = cache
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def key(self, slot: Slot) -> str:
        return self._opened(slot.shard).index.key(slot.sample)

    def sample(self, slot: Slot) -> Sample:
        """The whole sample of a slot."""
        return Sample(self.key(slot), self.images(slot), self.conversation(slot))

    def images(self, slot: Slot) -> list[bytes]:
        """Encoded pictures of a slot, in the order of their marks."""
        return [content for is_image, _, content in self._members(slot, images=True) if is_image]

    def conversation(self, slot: Slot) -> list[Turn]:
        """The checked turns of a slot."""
        record: dict = {}
        images = 0
        for is_image, is_json, content in self._members(slot, images=False):
            images += is_image
            if is_image:
                continue
            if is_json:
                # A caption beside its JSON (img2dataset) stands in where the JSON has none.
                record = record | _parse_json(content)
            else:
                record = {"caption": content.decode(errors="replace")} | record
        turns = parse_conversation(record, images, self.caption_prompt)
        if self.system_prompt and turns[0].role != "system":
            turns = [Turn("system", self.system_prompt), *turns]
        return turns

    def close(self) -> None:
        """Closes all files."""
        while self._open:
            os.close(self._open.popitem()[1].file)

    def _opened(self, number: int) -> "_OpenShard":
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) == OPEN_SHARDS:  # before the next one is opened: a remote shard may need its room
            os.close(self._open.popitem(last=False)[1].file)
        shard = self.shards[number]
        try:
            if shard.url:
                assert self.cache is not None
                index, file = open_remote(shard.url, self.cache), open_copy(shard, self.cache)
            else:
                index, file = open_index(shard.path), os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
            stat = os.fstat(file)
        except OSError as error:
            raise DataError(f"{shard.name}: the shard cannot be read ({error.strerror})") from error
        if index.shard.digest != shard.digest or stat.st_size != shard.size:
            os.close(file)
            raise DataError(_changed(shard))
        self._open[number] = _OpenShard(file, index, stat.st_size, stat.st_mtime_ns)
        return self._open[number]

    def _members(self, slot: Slot, images: bool) -> list[tuple[bool, bool, bytes]]:
        """(is_image, is_json, content) of each member; of pictures or of texts the content is left empty."""
        opened = self._opened(slot.shard)
        file, index, shard = opened.file, opened.index, self.shards[slot.shard]
        try:
            stat = os.fstat(file)
        except OSError as error:
            raise DataError(f"{shard.name}: the shard cannot be read ({error.strerror})") from error
        if (stat.st_size, stat.st_mtime_ns) != (opened.size, opened.mtime_ns):
            raise DataError(_changed(shard))
        rows = index.members(slot.sample)
        found = []
        columns = (index.is_image[rows], index.is_json[rows], index.offset[rows], index.size[rows])
        for is_image, is_json, offset, size in zip(*(column.tolist() for column in columns), strict=True):
            content = b""
            if is_image == images:
                try:
                    content = os.pread(file, size, offset)
                except OSError as error:
                    raise DataError(f"{shard.name}: the shard cannot be read ({error.strerror})") from error
                if len(content) != size:
                    raise DataError(_changed(shard))
            found.append((is_image, is_json, content))
        return found


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
