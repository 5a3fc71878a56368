"""How long every sample is, in tokens: what packing and grouping by length plan with, before a picture is read.

Kept beside the index of each tar, under a fingerprint of all that a length depends on.
"""

import hashlib
from functools import lru_cache, partial

import numpy as np

from trainer.data.kept import load_kept, save_kept
from trainer.data.order import Slot
from trainer.data.packing import PACKING_VERSION, pack_shapes
from trainer.data.parallel import in_processes
from trainer.data.reader import ShardReader
from trainer.data.remote_index import REMOTE_WORKERS
from trainer.data.template import ChatTemplate
from trainer.errors import BadSample

VERSION = 1


class Lengths:
    """Lengths of the samples of a reader's shards in a template's tokens."""

    def __init__(self, reader: ShardReader, template: ChatTemplate):
        self.reader = reader
        self.template = template
        prompts = f"{VERSION}\0{reader.system_prompt}\0{reader.caption_prompt}\0"
        self.fingerprint = hashlib.sha256((prompts + template.fingerprint).encode()).hexdigest()[:12]
        # Bound to the instance: an array for each shard that is read at a time.
        self.of = lru_cache(maxsize=reader.max_open)(self._of)

    def build(self) -> None:
        """Measures the shards whose lengths are not kept yet, on all cores."""
        missing = [number for number in range(len(self.reader.shards)) if not self._load(number)]
        remote = any(self.reader.shards[number].url for number in missing)
        workers = REMOTE_WORKERS if remote else None
        for _ in in_processes(partial(_measure_and_keep, self), missing, "measuring texts", workers):
            pass

    def packs(self, groups: list[list[int]], max_length: int) -> list[int]:
        """Packs that the samples of each group of shards make; kept, so that a plan of millions opens at once."""
        shards = [self.reader.shards[number] for group in groups for number in group]
        # Size and time too, as for the lengths themselves: a digest is of headers, and texts can change behind those.
        versions = " ".join(f"{shard.digest} {shard.size} {shard.mtime_ns}" for shard in shards)
        digest = hashlib.sha256(versions.encode()).hexdigest()
        stamp = [PACKING_VERSION, max_length, int(digest[:15], 16)]
        kind, place = f"packs-{self.fingerprint}-{max_length}", shards[0].place
        if stored := load_kept(place, kind, stamp, ("packs",)):
            return stored["packs"].tolist()
        count = partial(_count_packs, self, max_length)
        counts = list(in_processes(count, groups, "planning packs"))
        save_kept(place, kind, stamp, {"packs": np.array(counts, dtype=np.int64)})
        return counts

    def of_group(self, shards: list[int]) -> np.ndarray:
        """(samples of all these shards,) int64: as `of`, shard after shard."""
        return np.concatenate([self.of(shard) for shard in shards])

    def __call__(self, slot: Slot) -> int:
        """Tokens of a sample, image features included."""
        return int(self.of(slot.shard)[slot.sample])

    def _of(self, number: int) -> np.ndarray:
        """(S,) int64: tokens of a shard's samples, image features included, uncut; 0 for one that is of no use."""
        stored = self._load(number) or self.measure(number)
        return stored["text_tokens"].astype(np.int64) + stored["images"] * len(self.template.image_run)

    def _load(self, number: int) -> dict[str, np.ndarray]:
        shard = self.reader.shards[number]
        stamp = [VERSION, shard.size, shard.mtime_ns]
        return load_kept(shard.place, f"lengths-{self.fingerprint}", stamp, ("text_tokens", "images"))

    def measure(self, number: int) -> dict[str, np.ndarray]:
        """Encodes the texts of a shard. text_tokens and images (S,) int32, both 0 for a sample that is of no use."""
        shard = self.reader.shards[number]
        text_tokens, images = np.zeros((2, len(shard)), dtype=np.int32)
        for i in range(len(shard)):
            try:
                input_ids, _ = self.template.encode(self.reader.conversation(Slot(number, i)))
            except BadSample:
                continue  # named when its turn comes
            images[i] = input_ids.count(self.template.image_run[0]) // len(self.template.image_run)
            text_tokens[i] = len(input_ids) - images[i] * len(self.template.image_run)
        return {"text_tokens": text_tokens, "images": images}


def _count_packs(lengths: Lengths, max_length: int, group: list[int]) -> int:
    return pack_shapes(lengths.of_group(group), max_length).count


def _measure_and_keep(lengths: Lengths, number: int) -> None:
    shard = lengths.reader.shards[number]
    stamp = [VERSION, shard.size, shard.mtime_ns]
    with lengths.reader:
        save_kept(shard.place, f"lengths-{lengths.fingerprint}", stamp, lengths.measure(number))
