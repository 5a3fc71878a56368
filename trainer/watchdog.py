"""Ends a job that hangs, and says which rank stopped, where, and at which samples.

    beat(phase, step, keys)   every rank, at the same places of the loop: two assignments, no file
    rank-N.json               what rank N does, once a second, from a thread
    a rank without a beat     -> `hang.json`, which every rank looks for -> all write their stacks to rank-N.stacks.txt
                              -> of each host the lowest living rank says who stopped -> all end their children, leave

Time is counted in the ticks of a thread, so that a job that was suspended for hours does not wake up hanging. A thread
cannot tick while something stuck holds Python's lock: for that case faulthandler has a clock of its own.
"""

import contextlib
import faulthandler
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from trainer.errors import printable

EXIT_HUNG = 70
TICK_SECONDS = 1.0
GRACE_SECONDS = 4.0
"""From a hang that is known to the summary: a few ticks, in which every rank hears of it and writes its stacks."""
HANG = "hang.json"
COLLECTIVES = (b"distributed_c10d.py", b" in sum_over_ranks\n", b" in whole_loss\n", b" in _take_model_step\n")
"""In the stack of a thread that waits for other ranks. With gloo it stands in the first; with NCCL a collective returns
at once, and it stands where a result is first looked at: in our own sums, or in DeepSpeed's step."""
SHOWN = 8
"""Ranks, and samples of one, in the summary; the files have all."""

logger = logging.getLogger(__name__)


class Heartbeat:
    """What this rank does now, and the threads that watch over it. The files of earlier runs in the folder do no harm.

    limit_seconds: without a beat for so long, the job hangs. The folder need not be shared by the hosts, but only then
    does a rank hear of a hang before it meets it itself.
    start: of the job, the same on all its ranks and on those of no other: tells whose a file is.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, limit_seconds: float, start: str = ""):
        self.folder, self.rank, self.world_size, self.limit_seconds = folder, rank, world_size, limit_seconds
        self.start = start
        self._limit = limit_seconds
        self._last: tuple[str, int, int, Sequence[str]] = ("start", 0, 0, ())  # phase, step, beats in it, keys
        self._ticks = self._idle = 0
        self._hung: str | None = None
        self._in_collective = False
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._stacks_file = folder / f"rank-{rank}.json", folder / f"rank-{rank}.stacks.txt"
        self._stacks = os.open(self._stacks_file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._old_hang = _read(folder / HANG)
        self._file.write_bytes(b"")
        self._publish()
        self._end = threading.Event()
        loops = {"watch": self._watch, "publish": self._publish_and_look}
        self._threads = [threading.Thread(target=loop, name=f"watchdog-{n}", daemon=True) for n, loop in loops.items()]
        for thread in self._threads:
            thread.start()

    def __call__(self, phase: str, step: int, keys: Sequence[str] = ()) -> None:
        """Says that this rank goes on, with what, and at which samples. All ranks call it at the same places."""
        _, last_step, beats, _ = self._last
        self._last = (phase, step, beats + 1 if step == last_step else 0, keys)

    @contextlib.contextmanager
    def phase(self, name: str, limit: float = math.inf) -> Iterator[None]:
        """A part of the loop with a longer limit, in seconds; by default with none."""
        before, last = self._limit, self._last
        self._limit = max(limit, before)
        self(name, last[1], last[3])
        try:
            yield
        finally:
            self(last[0], last[1], last[3])
            self._limit = before

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the watch: from here on this rank may take its time. Does not return from a hang that is known."""
        self._end.set()
        watch, publish = self._threads
        watch.join()
        faulthandler.cancel_dump_traceback_later()
        publish.join(timeout=GRACE_SECONDS)
        self._last = ("ended", *self._last[1:])  # no beat: who waits for this rank has as many
        self._publish()
        with contextlib.suppress(OSError):
            if os.fstat(self._stacks).st_size == 0:
                self._stacks_file.unlink()
        os.close(self._stacks)

    # No file is touched by the thread that decides: a file system that is away is a reason to hang.
    def _watch(self) -> None:
        seen, armed, ticks = self._last, 0.0, 0
        while not self._end.wait(TICK_SECONDS):
            limit, ticks = min(self._limit, 24 * 3600), ticks + 1
            # It makes a thread each time, which does not go well with forking data workers: so not at every tick.
            if limit != armed or ticks * TICK_SECONDS > limit / 10:
                faulthandler.dump_traceback_later(1.5 * limit, exit=True, file=self._stacks)
                armed, ticks = limit, 0
            last = self._last
            self._idle, seen = (self._idle + 1 if last is seen else 0), last
            if self._hung is None and self._idle * TICK_SECONDS > self._limit:
                self._hung = "it stopped"
            if self._hung is not None:
                faulthandler.dump_traceback_later(8 * GRACE_SECONDS, exit=True, file=self._stacks)
                report = threading.Thread(target=self._report, name="watchdog-report", daemon=True)
                report.start()
                report.join(timeout=4 * GRACE_SECONDS)
                kill_descendants()
                os._exit(EXIT_HUNG)

    def _publish_and_look(self) -> None:
        """Writes this rank's file and looks for a hang elsewhere: the common file, and the rank after this one."""
        other = (self.rank + 1) % self.world_size
        seen, still = _read(self.folder / f"rank-{other}.json"), 0
        while not self._end.wait(TICK_SECONDS):
            self._publish()
            hang = _read(self.folder / HANG)
            if hang and hang != self._old_hang:
                self._hung = self._hung or "told by another rank"
            content = _read(self.folder / f"rank-{other}.json")
            still, seen = (still + 1 if content == seen else 0), content
            # A file of another start is of a rank that is not there yet, or on a host whose files are not seen here.
            state = _parse(content)
            was_alive = state.get("start") == self.start and state["phase"] != "ended"
            if other != self.rank and was_alive and still * TICK_SECONDS > self.limit_seconds:
                self._hung = self._hung or f"rank {other} is silent"

    def _publish(self) -> None:
        phase, step, beats, keys = self._last
        self._ticks += 1
        state = {
            "start": self.start, "rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(),
            "phase": phase, "step": step, "beats": beats, "idle_seconds": self._idle * TICK_SECONDS, "hung": self._hung,
            "in_collective": self._in_collective, "ticks": self._ticks, "keys": list(keys),
        }  # fmt: skip
        try:
            # In place, and never shorter: a disk that became full must not make a healthy rank look silent.
            with self._file.open("r+b", buffering=0) as file:
                file.write(json.dumps(state).encode().ljust(os.fstat(file.fileno()).st_size))
        except OSError as error:
            if self._ticks == 1:
                raise
            logger.debug("%s: %s", self._file, error)

    def _report(self) -> None:
        """Stacks, then the word to the others, then the summary, if no lower rank is there to give it."""
        with contextlib.suppress(OSError):  # a full disk: the others are told all the same, if they can be
            stacks = self._dump()
            self._in_collective = any(place in stacks for place in COLLECTIVES)
        self._publish()
        with contextlib.suppress(OSError):
            if _read(self.folder / HANG) in (None, self._old_hang):
                (self.folder / HANG).write_text(json.dumps({"rank": self.rank, "token": uuid.uuid4().hex}))
        time.sleep(GRACE_SECONDS)
        read = {rank: _parse(_read(self.folder / f"rank-{rank}.json")) for rank in range(self.world_size)}
        states = {rank: state for rank, state in read.items() if state}
        # One rank of each host says it: hosts have logs of their own, and may have lost sight of one another.
        here = [rank for rank, state in states.items() if state["hung"] and state["host"] == socket.gethostname()]
        if self.rank == min(here, default=self.rank):
            # Not through Python's streams: what is stuck may hold their locks.
            os.write(2, f"\n{printable(summary(states, self.folder), lines=True)}\n".encode())
        time.sleep(GRACE_SECONDS / 2)  # a launcher ends the others as soon as one has left

    def _dump(self) -> bytes:
        """Appends the stacks of all threads to this rank's file, after those of earlier hangs: what was written."""
        phase, step, _, keys = self._last
        start = os.fstat(self._stacks).st_size
        head = f"rank {self.rank} on {socket.gethostname()}, process {os.getpid()}: {self._hung}\n"
        place = f"{time.strftime('%Y-%m-%d %H:%M:%S')} phase {phase}, step {step}, samples {list(keys)}\n\n"
        os.write(self._stacks, printable(head + place, lines=True).encode())
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        return os.pread(self._stacks, os.fstat(self._stacks).st_size - start, start)


class NoHeartbeat:
    """Stands in for `Heartbeat` where nobody watches."""

    def __call__(self, phase: str, step: int, keys: Sequence[str] = ()) -> None:
        pass

    @contextlib.contextmanager
    def phase(self, name: str, limit: float = math.inf) -> Iterator[None]:
        yield


def summary(states: dict[int, dict[str, Any]], folder: Path) -> str:
    """What is known about a hang, from the states of the ranks: who is waited for, and where the others wait."""
    waited_for = _waited_for(states)
    lines = ["error: the job hangs and is ended. Waited for:"]
    lines += [f"  {_describe(states[rank])}" for rank in waited_for[:SHOWN]]
    if len(waited_for) > SHOWN:
        lines.append(f"  and {len(waited_for) - SHOWN} more ranks")
    others = Counter((s["step"], s["phase"]) for rank, s in states.items() if rank not in waited_for)
    lines += [
        f"  {count} other rank(s) wait in phase {phase} of step {step}" for (step, phase), count in others.items()
    ]
    lines.append(f"Stacks and samples of every rank: {folder}/rank-*.stacks.txt")
    return "\n".join(lines)


def _waited_for(states: dict[int, dict[str, Any]]) -> list[int]:
    """The ranks that do not even answer; else those with the fewest beats, as all beat at the same places, and of these
    those that wait for no other rank; else those that stopped first. Clocks of two hosts are not compared."""
    if silent := [rank for rank, state in states.items() if not state["hung"] and state["phase"] != "ended"]:
        return silent
    fewest = min((s["step"], s["beats"]) for s in states.values())
    behind = [rank for rank, s in states.items() if (s["step"], s["beats"]) == fewest]
    behind = [rank for rank in behind if not states[rank]["in_collective"]] or behind
    longest = max(states[rank]["idle_seconds"] for rank in behind)
    return [rank for rank in behind if states[rank]["idle_seconds"] >= longest - 3 * TICK_SECONDS]


def _describe(state: dict[str, Any]) -> str:
    keys = state["keys"]
    samples = ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
    return (
        f"rank {state['rank']} (host {state['host']}, process {state['pid']}) in phase {state['phase']} of step "
        f"{state['step']}, for {state['idle_seconds']:.0f} s, samples: {samples or 'none named'}"
        + ("; it waits for other ranks" if state["in_collective"] else "")
        + ("" if state["hung"] or state["phase"] == "ended" else "; it did not answer: gone, or stuck in C code")
    )


def kill_descendants() -> None:
    """Ends what this process has started, such as data workers, and sees them gone."""
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=GRACE_SECONDS)


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _parse(content: bytes | None) -> dict[str, Any]:
    """A rank's state; empty if the file is not there or half written."""
    try:
        state = json.loads(content or b"{}")
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}
