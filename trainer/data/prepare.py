"""A source -> shards: in parallel, each whole or not there, and after a break only those that are missing.

Shard n is made of the entries [n k, (n + 1) k) of the source and of nothing else, whatever is left out of it. So any
process can make any shard, the number of processes does not show in the bytes, and a restart needs no history:

    prepare.json               what the shards are made from; written first, and another source is refused later
    NAME-000000.tar            the samples
    NAME-000000.report.json    how many were kept and why the rest was not; written last: with it the shard is done
"""

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trainer.data.index import open_index
from trainer.data.parallel import in_processes
from trainer.data.sources.source import Source
from trainer.data.writer import ShardFile, shard_name, write_whole
from trainer.errors import BadSample, DataError, printable

MANIFEST = "prepare.json"
LOCK_SECONDS = 3.0
"""How long the workers of a run that was just killed may take to end."""


@dataclass
class Preparation:
    """What is made from what."""

    source: Source
    title: str
    """The source as the user named it, for messages."""
    prefix: str
    """Of the shards' names."""
    out: Path
    options: dict[str, Any]
    """All that the samples depend on beside the source's content; to be stored as JSON."""
    samples_per_shard: int = 1000
    skip_bad: bool = False
    """Leave bad entries out and report them; otherwise the first ends the preparation."""

    def shards(self) -> range:
        return range(-(-len(self.source) // self.samples_per_shard))

    def entries(self, shard: int) -> range:
        start = shard * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, len(self.source)))

    def tar(self, shard: int) -> Path:
        return self.out / shard_name(self.prefix, shard)

    def report(self, shard: int) -> Path:
        return self.tar(shard).with_suffix(".report.json")


@dataclass
class Summary:
    """What came of all entries."""

    kept: int = 0
    shards: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Entries by kind."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first message of each kind."""

    def table(self) -> str:
        """A line for each kind of what was left out; empty if nothing was."""
        width = max(map(len, self.left_out), default=0)
        lines = [f"{n:8}  {kind:{width}}  {self.examples[kind]}" for kind, n in self.left_out.most_common()]
        return "".join(f"{line}\n" for line in lines)


def prepare(task: Preparation, workers: int) -> Summary:
    """Makes the shards that are not there yet, in so many processes.

    Raises DataError if the folder cannot be used or holds something else, if nothing was kept, and, unless bad entries
    are to be left out, at the first of them; shards that are whole by then stay, and the next run goes on after them.
    """
    with _open_folder(task):
        pending = [shard for shard in task.shards() if not _is_done(task, shard)]
        if done := len(task.shards()) - len(pending):
            print(f"{task.out} already holds {done} of {len(task.shards())} shards; going on with the rest", flush=True)
        for _ in in_processes(partial(make_shard, task), pending, task.title, workers):
            pass
        summary = _summarize(task)
    if not summary.kept:
        raise DataError(f"{task.title}: no sample was good enough to keep:\n{summary.table()}".rstrip(":\n"))
    return summary


# --- One shard ---


def make_shard(task: Preparation, shard: int) -> None:
    """Writes the tar, its index and its report."""
    left_out = []
    tar = task.tar(shard)
    try:
        with ShardFile(tar) as file:
            for number in task.entries(shard):
                try:
                    record = task.source.record(number)
                except BadSample as error:
                    if not task.skip_bad:
                        raise DataError(_refusal(task, str(error))) from error
                    left_out.append({"entry": number, "kind": error.kind, "message": printable(str(error))})
                else:
                    file.write(record.key, record.members)
        if file.samples:
            assert len(open_index(tar)) == file.samples, f"{tar}: written {file.samples} samples, found others"
        else:
            tar.unlink(missing_ok=True)  # of an earlier try, whose pictures were still there
        size = tar.stat().st_size if file.samples else 0
        report = {"entries": len(task.entries(shard)), "kept": file.samples, "bytes": size, "left_out": left_out}
        write_whole(task.report(shard), json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{tar}: cannot be written ({error.strerror}); a new run goes on with this shard") from error


def _is_done(task: Preparation, shard: int) -> bool:
    report = _read_json(task.report(shard))
    if report is None:
        return False
    if report["left_out"] and not task.skip_bad:  # an earlier run was to leave them out, this one is not
        raise DataError(_refusal(task, report["left_out"][0]["message"]))
    tar = task.tar(shard)
    return not report["kept"] or (tar.is_file() and tar.stat().st_size == report["bytes"])


def _summarize(task: Preparation) -> Summary:
    summary = Summary()
    for shard in task.shards():
        report = _read_json(task.report(shard)) or {}
        summary.kept += report["kept"]
        summary.shards += report["kept"] > 0
        for bad in report["left_out"]:
            summary.left_out[bad["kind"]] += 1
            summary.examples.setdefault(bad["kind"], bad["message"])
    return summary


def _refusal(task: Preparation, message: str) -> str:
    return printable(f"{task.title}: {message}; --skip-bad leaves such entries out")


# --- The folder ---


@contextmanager
def _open_folder(task: Preparation) -> Iterator[None]:
    """Claims the folder for this preparation, alone, and removes what killed writers have left in it."""
    try:
        task.out.mkdir(parents=True, exist_ok=True)
        folder = os.open(task.out, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"--out {task.out}: cannot be used as a folder ({error.strerror}); choose another") from error
    try:
        _lock(task, folder)
        try:
            _claim(task)
            _remove_partial(task)
        except OSError as error:
            raise DataError(f"--out {task.out}: cannot be written to ({error.strerror}); choose another") from error
        try:
            yield
        except BaseException:
            _remove_partial(task)
            raise
    finally:
        os.close(folder)


def _lock(task: Preparation, folder: int) -> None:
    """Two runs at once would remove each other's halves. Forked workers hold the lock too, until the last is gone."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise DataError(
                    f"--out {task.out}: another run is writing there; wait for its end, or end it"
                ) from error
            time.sleep(0.1)
        except OSError:
            return  # a file system without locks


def _claim(task: Preparation) -> None:
    manifest = {
        "source": task.source.fingerprint(),
        "entries": len(task.source),
        "samples_per_shard": task.samples_per_shard,
        "options": task.options,
    }
    manifest = json.loads(json.dumps(manifest))  # as it will be read
    file = task.out / MANIFEST
    tars = len(list(task.out.glob("*.tar")))
    stored = _read_json(file)
    if stored is None and tars:
        raise DataError(
            f"--out {task.out} already holds {tars} shards, and no {MANIFEST} that says what they were made from; "
            f"choose another folder or remove them"
        )
    if stored == manifest:
        return
    if stored is not None and tars:
        changed = "; ".join(_changes(stored, manifest))
        raise DataError(
            f"--out {task.out} holds shards of another preparation: {changed}; choose another folder, or remove this "
            f"one to start anew"
        )
    for report in task.out.glob("*.report.json"):  # of one that kept nothing
        report.unlink()
    write_whole(file, json.dumps(manifest, indent=1) + "\n")


def _changes(before: dict[str, Any], now: dict[str, Any], where: str = "") -> Iterator[str]:
    """What differs between two manifests, value by value."""
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{where}{name}.")
        elif old != new:
            yield f"{where}{name} was {json.dumps(old)}, and is now {json.dumps(new)}"


def _remove_partial(task: Preparation) -> None:
    for half in task.out.glob(f".{task.prefix}-*.tmp*"):  # of shards, reports and indexes
        half.unlink(missing_ok=True)


def _read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or none that is whole."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None
