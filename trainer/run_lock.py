"""One run, one folder: while rank 0 trains, output_dir/.lock says who does, and a second job is refused by name.

The file is made with O_EXCL, which shared file systems keep as well, and its counter `heartbeat` moves every few
seconds. No clock is compared with another: a newcomer looks whether the counter moves. A lock is stale if it does not,
or at once if its process was of this very machine and is gone. There is no flock: not every shared file system has it,
and a forked data worker that outlives its run would go on holding it.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, UserError

FILE = ".lock"
HEARTBEAT_SECONDS = 5.0
LOOK_SECONDS = 1.0
"""Between two looks of a newcomer."""
LOCK_STALE_SECONDS = 60.0
"""A lock whose heartbeat stands still for so long, in looks of a newcomer, is stale. Looks are counted and not time, so
that a file system that was away for a while, for both sides, makes none stale."""

logger = logging.getLogger(__name__)


class RunLock:
    """The lock while it is held. A thread moves its heartbeat, and finds out if it is ours no more."""

    def __init__(self, file: Path, descriptor: int, entry: dict[str, Any]):
        self.failure: UserError | None = None
        """Why the run must stop, once the lock is lost."""
        self._file, self._descriptor, self._entry = file, descriptor, entry
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises UserError if the lock is lost, since the last heartbeat at the latest. Costs nothing."""
        if self.failure is not None:
            raise self.failure

    def _keep(self) -> None:
        failed = 0
        while not self._end.wait(HEARTBEAT_SECONDS) and self.failure is None:
            try:
                content = _read(self._file)
                if content is None:
                    self._lose("it is gone, and with it what keeps other jobs out")
                elif _parse(content).get("token") != self._entry["token"]:
                    self._lose(f"it was taken over by {_holder(_parse(content))}")
                self._entry["heartbeat"] += 1
                # Into the file we made, not into the name: if another job's lock has the name by now, it stays whole.
                _write(self._descriptor, self._entry)
                failed = 0
            except OSError as error:
                failed += 1
                if failed * HEARTBEAT_SECONDS >= LOCK_STALE_SECONDS:
                    self._lose(f"it could not be refreshed ({error.strerror}), so another job may take it over")

    def _lose(self, what: str) -> None:
        self.failure = UserError(
            f"the lock of this run, {self._file}, is lost: {what}. This job stops, so as not to write into the same "
            f"folder; start it again, with another run.output_dir if that job is to go on"
        )

    def release(self) -> None:
        """Stops the heartbeat and removes the file, if it is still ours."""
        self._end.set()
        self._thread.join(timeout=HEARTBEAT_SECONDS)  # a file system may be away, and us nearly so
        with contextlib.suppress(OSError):
            if _parse(_read(self._file) or b"").get("token") == self._entry["token"]:
                self._file.unlink()
        os.close(self._descriptor)


@contextlib.contextmanager
def run_lock(output_dir: Path) -> Iterator[RunLock]:
    """Holds the lock of a run's folder, which must exist. For rank 0 alone.

    Raises ConfigError, naming its job, if another holds it; that takes up to `LOCK_STALE_SECONDS` to know if the other
    is of another host. The holder is to look at `failure` now and then.
    """
    file, entry = output_dir / FILE, _entry()
    try:
        descriptor = _take(file, entry)
    except OSError as error:
        raise ConfigError(f"run.output_dir: {file} cannot be made ({error.strerror}); choose another") from error
    lock = RunLock(file, descriptor, entry)
    try:
        yield lock
    finally:
        lock.release()


def _take(file: Path, entry: dict[str, Any]) -> int:
    """Makes a lock file, or takes it over from one that is gone: its descriptor. Raises ConfigError if it is held.

    Of several that find one stale lock, only who makes the file named after that lock may replace it; the claim is
    itself such a lock, as its maker may die too, and becomes the lock by its new name.
    """
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            stale = _wait_until_stale(file)
        else:
            try:
                _write(descriptor, entry)
            except OSError:
                file.unlink()
                raise
            return descriptor
        if stale is None:
            continue
        lock_id = str(_parse(stale).get("token", stale)).encode()
        claim = file.with_name(f"{file.name}.{hashlib.sha256(lock_id).hexdigest()[:16]}")
        descriptor = _take(claim, entry)
        if _read(file) == stale:
            logger.warning("took over the lock %s of %s, which is gone", file, _holder(_parse(stale)))
            claim.replace(file)
            return descriptor
        os.close(descriptor)
        claim.unlink(missing_ok=True)


def _wait_until_stale(file: Path) -> bytes | None:
    """The content of a stale lock, or None if there is none any more. Raises ConfigError if its job is alive."""
    first = content = _read(file)
    for look in range(max(1, round(LOCK_STALE_SECONDS / LOOK_SECONDS))):
        if content is None:
            return None
        entry = _parse(content)
        alive = _is_alive(entry)
        if alive is False:
            return content
        if alive or content != first:
            raise ConfigError(
                f"run.output_dir: {file.parent} is in use by {_holder(entry)}, since {entry.get('started')}: choose "
                f"another run.output_dir, wait for the end of that run, or remove {file} if it is surely gone"
            )
        if look == 0:
            logger.info("%s is there, of %s: waiting to see whether it is alive", file, _holder(entry))
        time.sleep(LOOK_SECONDS)
        content = _read(file)
    return content if content == first else None  # moved at the last look: look again


def _entry() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),  # for people only
        "machine": _machine(),
        "process_start": _process_start(os.getpid()),
        "token": uuid.uuid4().hex,
        "heartbeat": 0,  # at the end, and only growing: a new entry covers the old one
    }


def _machine() -> str | None:
    """What tells where a process id means something: this boot of this kernel, and this container's view of it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """When a process was started, in ticks since the boot, which no setting of a clock moves; "dead" for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return "dead" if fields[0] in "ZX" else fields[19]


def _is_alive(entry: dict[str, Any]) -> bool | None:
    """Whether the process of an entry runs, or None if that cannot be told from here."""
    pid = entry.get("pid")
    if entry.get("machine") is None or entry["machine"] != _machine() or type(pid) is not int or not 0 < pid < 2**31:
        return None
    try:
        os.kill(pid, 0)  # asks only
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    start = _process_start(pid)
    return start is None or start == entry.get("process_start")


def _holder(entry: dict[str, Any]) -> str:
    job = f", Slurm job {entry['job']}" if entry.get("job") else ""
    return f"process {entry.get('pid', 'unknown')} on host {entry.get('host', 'unknown')}{job}"


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse(content: bytes) -> dict[str, Any]:
    """The entry in a lock file; an empty one if it is none, as while it is made."""
    try:
        entry = json.loads(content)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _write(descriptor: int, entry: dict[str, Any]) -> None:
    os.pwrite(descriptor, json.dumps(entry).encode(), 0)
    os.fsync(descriptor)  # shown to other hosts
