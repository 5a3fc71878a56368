"""The ledger of a run: every sample that could not be used, in bad_samples.jsonl, and the limit to their number.

Such a sample leaves its place in the batch empty, so every rank's step keeps its shape and no other sample is seen
twice; a resumed run meets the same ones again and writes the same lines.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path

from trainer.data.samples import Rejected
from trainer.dist import gather, log
from trainer.errors import DataError
from trainer.metrics import keep_lines

FILE = "bad_samples.jsonl"
ENOUGH_SAMPLES = 1000
"""The share of bad samples is taken of at least so many (or of all there are), so that an early one stops no run."""


class Ledger:
    """Counts bad samples by kind; rank 0 writes them down.

    counts: of the run so far, by kind. max_fraction: of the samples seen, above which the run stops.
    """

    def __init__(
        self, output_dir: Path, step: int, counts: dict[str, int], max_fraction: float, samples: int, enabled: bool
    ):
        self.counts = Counter(counts)
        self.max_fraction = max_fraction
        self.samples = samples
        self.file = output_dir / FILE
        self.enabled = enabled
        self._held_out: set[tuple[str, str]] = set()
        self._reasons: dict[str, str] = {}
        if enabled:
            kept = keep_lines(self.file, lambda line: line["step"] <= step)
            self._held_out = {(line["shard"], line["key"]) for line in kept if line.get("held_out")}

    def record(self, step: int, rejected: list[Rejected], seen: int) -> None:
        """Notes the bad samples of a step on all ranks. All ranks call this, where any of them has one.

        seen: samples so far. Raises DataError with the table of kinds, on all ranks, where there are too many.
        """
        found = _gather(rejected)
        self._write({"step": step}, found)
        self.counts.update(entry.kind for entry in found)
        for entry in found:
            self._reasons.setdefault(entry.kind, entry.reason)
        bad, seen = self.counts.total(), max(seen, min(ENOUGH_SAMPLES, self.samples))
        log.warning("step %d: left out %d bad sample(s), %d so far, see %s", step, len(found), bad, self.file)
        if bad > self.max_fraction * seen:
            raise DataError(
                f"{bad} bad samples up to step {step}, more than data.max_bad_fraction={self.max_fraction} of {seen}:\n"
                f"{self.table()}\n{self.file} names each; mend or remove them, or raise data.max_bad_fraction",
                on_all_ranks=True,
            )

    def record_held_out(self, step: int, rejected: list[Rejected]) -> None:
        """Notes bad held-out samples, each once; they do not count towards the limit. All ranks call this."""
        found = [entry for entry in _gather(rejected) if (entry.shard, entry.key) not in self._held_out]
        self._held_out.update((entry.shard, entry.key) for entry in found)
        self._write({"step": step, "held_out": True}, found)
        if found:
            log.warning("left out %d bad held-out sample(s), see %s", len(found), self.file)

    def table(self) -> str:
        """Number and kind, most frequent first, each with the first reason that this process has seen."""
        lines = []
        for kind, count in self.counts.most_common():
            reason = f" (such as: {self._reasons[kind]})" if kind in self._reasons else ""
            lines.append(f"  {count:8}  {kind}{reason}")
        return "\n".join(lines)

    def _write(self, head: dict, found: list[Rejected]) -> None:
        if not (self.enabled and found):
            return
        with self.file.open("a", encoding="utf-8") as file:
            for entry in found:
                file.write(json.dumps({**head, **dataclasses.asdict(entry)}, ensure_ascii=False) + "\n")


def _gather(rejected: list[Rejected]) -> list[Rejected]:
    """Those of all ranks, in an order that does not depend on which rank had which."""
    return sorted((entry for part in gather(rejected) for entry in part), key=lambda entry: (entry.shard, entry.key))
