"""Checks shards end to end: what a run would stumble over, found before it, with shard and key.

tar -> scanned anew, compared with its kept index -> every conversation parsed [and encoded], every picture decoded
all tars -> one shard twice; as a note, one key in several shards
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from trainer.config import DataConfig
from trainer.data.index import ShardIndex, differing_columns, find_shard, scan
from trainer.data.kept import cache_folder
from trainer.data.order import Slot
from trainer.data.parallel import in_processes
from trainer.data.picture import decode
from trainer.data.reader import ShardReader
from trainer.data.remote import ShardCache
from trainer.data.remote_index import open_any
from trainer.data.template import ChatTemplate
from trainer.errors import BadSample, DataError, printable
from trainer.urls import shown

KEYS_NAMED = 10
"""Keys that are named of those which two shards have in common."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    """In words that many findings share."""
    what: str
    key: str | None = None
    """Of the sample; None where it is the shard's own."""
    is_note: bool = False
    """Worth a look, and no problem."""

    def line(self, name: str) -> str:
        """What is wrong in which shard, on one line: keys and names may hold anything, control characters too."""
        sample = "" if self.key is None else f"sample {self.key!r}: "
        return f"{printable(name)}: {sample}{printable(' '.join(self.what.split()))}"


@dataclass
class Report:
    """What there is in one tar, and what is wrong with it."""

    place: Path | str
    """Its path, or its URL."""
    samples: int = 0
    images: int = 0
    cut_samples: int = 0
    """Longer than `max_length`: no problem, as their text is cut and they are trained on."""
    cut_tokens: int = 0
    digest: str = ""
    """Empty where the tar cannot be read."""
    key_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """(samples,) uint64: a run of a hundred million samples has no room for the keys themselves."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the tar, for people."""
        return shown(self.place) if isinstance(self.place, str) else str(self.place)


@dataclass(frozen=True)
class Verifier:
    """How shards are read."""

    data: DataConfig
    template: ChatTemplate | None = None
    """With it texts are encoded too, so that those are found which leave nothing to learn in `data.max_length`."""
    cache: ShardCache | None = None
    """Local copies of remote shards."""


def check_shards(verifier: Verifier, places: list[Path | str]) -> Iterator[Report]:
    """The report of each tar, in order, made on all cores. A damaged tar is reported like any other."""
    return in_processes(partial(check_shard, verifier), places, "verifying shards")


def check_shard(verifier: Verifier, place: Path | str) -> Report:
    """Scans one tar, compares its index, reads every sample as a run does."""
    report, data = Report(place), verifier.data
    try:
        index = _check_index(verifier, report)
        report.samples, report.images, report.digest = len(index), int(index.images().sum()), index.shard.digest
        report.key_hashes = np.array([_hash(index.key(i)) for i in range(len(index))], dtype=np.uint64)
        if not len(index):
            report.findings.append(Finding("no sample", "holds no sample"))
        with ShardReader([index.shard], data.system_prompt, data.caption_prompt, verifier.cache) as reader:
            for i in range(len(index)):
                _check_text(report, reader, i, verifier.template, data.max_length)
                _check_pictures(report, reader, i)
    except DataError as error:
        report.findings.append(Finding("shard cannot be used", str(error).removeprefix(f"{report.name}: ")))
    return report


def _check_index(verifier: Verifier, report: Report) -> ShardIndex:
    """The index that a run reads by. Raises DataError where the tar is damaged, or the index is not that of the tar."""
    place = report.place
    if isinstance(place, str):
        assert verifier.cache is not None
        kept = open_any(place, verifier.cache)
        copy = verifier.cache.open(place, kept.shard.size)
        try:
            found = scan(verifier.cache.place(place))
        finally:
            os.close(copy)
    else:
        found = scan(place)
        if find_shard(place) is None and place.with_name(f"{place.name}.index.npz").exists():
            what = "the index beside it is of another state of the tar, or of another version; it is made anew"
            report.findings.append(Finding("stale index", what))
        kept = open_any(place, None)
    wrong = differing_columns(kept, found)
    if kept.shard.digest != found.shard.digest:
        wrong.append("digest")
    if wrong:
        raise DataError(
            f"its index does not agree with it (in {', '.join(wrong)}), though size and time of change do; remove the "
            f"index (beside the tar, or in {cache_folder() / 'index'}) and verify again"
        )
    return kept


def _check_text(report: Report, reader: ShardReader, i: int, template: ChatTemplate | None, max_length: int) -> None:
    try:
        turns = reader.conversation(Slot(0, i))
        if template is None:
            return
        whole, labels = template.encode(turns)
        input_ids, _ = template.truncate(whole, labels, max_length)
        report.cut_samples += len(input_ids) < len(whole)
        report.cut_tokens += len(whole) - len(input_ids)
    except BadSample as error:
        report.findings.append(Finding(error.kind, str(error), reader.key(Slot(0, i))))


def _check_pictures(report: Report, reader: ShardReader, i: int) -> None:
    pictures = reader.images(Slot(0, i))
    for number, picture in enumerate(pictures, start=1):
        try:
            decode(picture)
        except BadSample as error:
            which = f"picture {number} of {len(pictures)}: " if len(pictures) > 1 else ""
            report.findings.append(Finding(error.kind, f"{which}{error}", reader.key(Slot(0, i))))


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest())


def check_together(verifier: Verifier, reports: list[Report]) -> Iterator[tuple[str, Finding]]:
    """What is wrong between tars, each with the name of the later one: the same samples.

    And, as notes, other samples under the same keys: a run reads them as what they are.
    """
    seen: dict[str, str] = {}
    distinct = []
    for report in reports:
        if report.samples and (first := seen.get(report.digest)):
            what = "is given twice" if first == report.name else f"holds the same samples as {first}"
            yield report.name, Finding("shard twice", what)
        elif report.samples:
            seen[report.digest] = report.name
            distinct.append(report)
    for (earlier, later), samples in _shared_keys(distinct).items():
        index = open_any(distinct[later].place, verifier.cache)
        keys = [repr(index.key(i)) for i in samples[:KEYS_NAMED]]
        more = f" and {len(samples) - KEYS_NAMED} more" if len(samples) > KEYS_NAMED else ""
        what = (
            f"sample{'s' * (len(samples) > 1)} {', '.join(keys)}{more}: also in {distinct[earlier].name} (no problem)"
        )
        yield distinct[later].name, Finding("key in several shards", what, is_note=True)


def _shared_keys(reports: list[Report]) -> dict[tuple[int, int], list[int]]:
    """(number of a report, number of a later one) -> samples of the later one whose keys the other has too."""
    hashes = np.concatenate([report.key_hashes for report in reports] or [np.zeros(0, np.uint64)])
    sizes = [report.samples for report in reports]
    starts = np.cumsum([0, *sizes])
    by_hash = np.argsort(hashes, kind="stable")  # equal ones stay in the order of the tars
    same = np.flatnonzero(hashes[by_hash][1:] == hashes[by_hash][:-1])
    pairs: dict[tuple[int, int], list[int]] = {}
    for earlier, later in sorted(zip(by_hash[same].tolist(), by_hash[same + 1].tolist(), strict=True)):
        first, second = (int(np.searchsorted(starts, place, side="right")) - 1 for place in (earlier, later))
        pairs.setdefault((first, second), []).append(later - int(starts[second]))
    return pairs


def summary(reports: list[Report], kinds: Counter[str], max_length: int) -> str:
    """Problems by kind, and the line that ends it all."""
    lines = [f"{count:8}  {kind}" for kind, count in kinds.most_common()]
    if cut := sum(report.cut_samples for report in reports):
        tokens = sum(report.cut_tokens for report in reports)
        lines.append(f"samples longer than max_length={max_length}: {cut}; {tokens} tokens are cut (no problem)")
    samples, problems = sum(report.samples for report in reports), sum(kinds.values())
    lines.append(f"{samples} samples in {len(reports)} shards: {problems} problem{'s' * (problems != 1)}")
    return "\n".join(lines)
