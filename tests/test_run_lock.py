"""One run, one folder: real processes, real kills."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer import run_lock as module
from trainer.errors import ConfigError, UserError, printable
from trainer.run_lock import run_lock

HOLD = """
import sys, time
from pathlib import Path
from trainer import run_lock
run_lock.HEARTBEAT_SECONDS = 0.05
if sys.argv[2] != "here":
    run_lock._machine = lambda: sys.argv[2]
with run_lock.run_lock(Path(sys.argv[1])) as lock:
    print("held", flush=True)
    while True:
        lock.check()
        time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def _short_times(monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(module, "LOCK_STALE_SECONDS", 0.5)


@pytest.fixture
def hold():
    """Starts a process that holds the lock of a folder, on this machine or as if on another."""
    processes = []

    def start(folder: Path, machine: str = "here") -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), machine],
            stdout=subprocess.PIPE, env={**os.environ, "SLURM_JOB_ID": "4711"},
        )  # fmt: skip
        processes.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def left(folder: Path, **entry) -> Path:
    """A lock as a job left it that was killed on another machine, unless told otherwise."""
    file = folder / module.FILE
    file.write_text(json.dumps({**module._entry(), "machine": "elsewhere", "token": "abc", **entry}))
    return file


def seconds_to_take(folder: Path) -> float:
    started = time.monotonic()
    with run_lock(folder) as lock:
        lock.check()
        return time.monotonic() - started


@pytest.mark.parametrize("machine", ["here", "elsewhere"])
def test_second_job_is_refused_by_name(tmp_path, hold, machine):
    first = hold(tmp_path, machine)
    with pytest.raises(ConfigError) as raised, run_lock(tmp_path):
        pass
    said = str(raised.value)
    for part in (str(tmp_path), f"process {first.pid}", f"host {os.uname().nodename}", "Slurm job 4711",
                 "another run.output_dir", f"remove {tmp_path / module.FILE}"):  # fmt: skip
        assert part in said
    time.sleep(0.3)
    assert first.poll() is None
    assert json.loads((tmp_path / module.FILE).read_text())["pid"] == first.pid


def test_lock_ends_with_the_run_also_with_one_that_fails(tmp_path):
    def fail() -> None:
        with run_lock(tmp_path):
            assert json.loads((tmp_path / module.FILE).read_text())["pid"] == os.getpid()
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reaped", [True, False])
def test_killed_job_of_this_machine_is_followed_at_once(tmp_path, hold, reaped):
    first = hold(tmp_path)
    first.send_signal(signal.SIGKILL)
    if reaped:
        first.wait()
    else:  # its parent has not asked for its end: a zombie has a process id, but is no job
        time.sleep(0.3)
    assert seconds_to_take(tmp_path) < 0.4
    assert not list(tmp_path.iterdir())


def test_process_id_that_another_process_has_now_is_no_job(tmp_path):
    left(tmp_path, machine=module._machine(), process_start="1")
    assert seconds_to_take(tmp_path) < 0.4


def test_stopped_job_of_this_machine_is_not_robbed(tmp_path, hold):
    first = hold(tmp_path)
    first.send_signal(signal.SIGSTOP)
    time.sleep(0.7)  # longer than a heartbeat may stand still
    with pytest.raises(ConfigError, match=f"process {first.pid}"), run_lock(tmp_path):
        pass


def test_killed_job_of_another_machine_is_followed_when_its_heartbeat_stands_still(tmp_path, hold, fault):
    first = hold(tmp_path, "elsewhere")
    first.kill()
    first.wait()
    assert 0.4 < seconds_to_take(tmp_path) < 2
    assert not list(tmp_path.iterdir())
    fault("a stale lock", "taken over once its heartbeat stands still", equal="-")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": -1, "token": "../../x"}', b"\xff", b'{"token": {}}'])
def test_file_that_is_no_lock_does_not_stop_a_run_for_ever(tmp_path, content):
    (tmp_path / module.FILE).write_bytes(content)
    assert 0.4 < seconds_to_take(tmp_path) < 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("started", "changed"), [("9999-12-31 23:59:59", 2**33), ("1970-01-01 00:00:00", 0)])
def test_clocks_do_not_matter(tmp_path, hold, started, changed, fault):
    os.utime(left(tmp_path, started=started), (changed, changed))
    assert 0.4 < seconds_to_take(tmp_path) < 2
    first = hold(tmp_path, "elsewhere")
    for _ in range(3):
        os.utime(tmp_path / module.FILE, (changed, changed))
        with pytest.raises(ConfigError, match=f"process {first.pid}"), run_lock(tmp_path):
            pass
    fault(f"a clock that was changed ({changed})", "no clock is asked", equal="-")


def _contend(folder: Path, rounds: int, ready, results) -> None:
    module.LOOK_SECONDS, module.LOCK_STALE_SECONDS = 0.02, 0.1  # often all at once
    for number in range(rounds):
        ready.wait()
        try:
            with run_lock(folder / str(number)):
                results.put((number, "held"))
                ready.wait()  # nobody leaves before all have tried
        except ConfigError:
            results.put((number, "refused"))
            ready.wait()


@pytest.mark.parametrize("claimed", [False, True])
def test_of_many_that_follow_a_dead_job_one_wins(tmp_path, claimed):
    rounds, takers = 8, 4
    for number in range(rounds):
        (tmp_path / str(number)).mkdir()
        left(tmp_path / str(number))
        if claimed:  # by another newcomer, that was killed before it had the lock
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                patch.setattr(module, "LOCK_STALE_SECONDS", 0.0)
                with pytest.raises(KeyboardInterrupt), run_lock(tmp_path / str(number)):
                    pass
            (claim,) = (tmp_path / str(number)).glob(f"{module.FILE}.*")
            claim.write_text(json.dumps({**json.loads(claim.read_text()), "process_start": "1"}))
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(takers, timeout=20), context.Queue()
    processes = [context.Process(target=_contend, args=(tmp_path, rounds, ready, results)) for _ in range(takers)]
    for process in processes:
        process.start()
    found = [results.get(timeout=20) for _ in range(rounds * takers)]
    for process in processes:
        process.join(timeout=20)
        assert process.exitcode == 0
    for number in range(rounds):
        assert sorted(result for n, result in found if n == number) == ["held"] + ["refused"] * (takers - 1)
        assert not list((tmp_path / str(number)).iterdir())


def test_lost_lock_is_noticed_and_left_to_its_new_holder(tmp_path):
    with run_lock(tmp_path) as lock:
        time.sleep(0.2)
        lock.check()
        other = tmp_path / "other"
        other.mkdir()
        left(other, pid=99, host="node-9", job="12").replace(tmp_path / module.FILE)
        content = (tmp_path / module.FILE).read_bytes()
        time.sleep(0.2)
        with pytest.raises(UserError, match=f"(?s){tmp_path}.*process 99 on host node-9, Slurm job 12"):
            lock.check()
    assert (tmp_path / module.FILE).read_bytes() == content


def test_holder_that_slept_while_another_took_over_stops_by_itself(tmp_path, hold):
    first = hold(tmp_path, "elsewhere")
    first.send_signal(signal.SIGSTOP)
    with run_lock(tmp_path) as lock:
        first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=5) == 1
        lock.check()
        assert json.loads((tmp_path / module.FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_lock_that_is_gone_is_noticed(tmp_path, gone):
    folder = tmp_path / "run"
    folder.mkdir()
    with run_lock(folder) as lock:
        shutil.rmtree(folder) if gone == "folder" else (folder / module.FILE).unlink()
        time.sleep(0.2)
        with pytest.raises(UserError, match="is gone"):
            lock.check()
        assert lock.failure is not None


def test_folder_that_cannot_hold_a_lock_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"run.output_dir: {tmp_path / 'file'}"), run_lock(tmp_path / "file"):
        pass


def test_what_another_wrote_into_the_lock_is_only_text(tmp_path):
    left(tmp_path, machine=module._machine(), host="\x1b[2J")
    with pytest.raises(ConfigError) as raised, run_lock(tmp_path):
        pass
    assert "\x1b" not in printable(str(raised.value))
