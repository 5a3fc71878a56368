"""A job that hangs is named and ended: real processes, a real collective, real signals."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from trainer import watchdog
from trainer.watchdog import EXIT_HUNG, Heartbeat, summary

LIMIT = 1.2


def _start(function, rank: int, folder: Path, args: tuple) -> None:
    watchdog.TICK_SECONDS, watchdog.GRACE_SECONDS = 0.1, 1.0
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    function(rank, folder, *args)


@pytest.fixture
def ranks(tmp_path):
    """Starts two real ranks of a function (rank, folder); none outlives the test."""
    started = []

    def start(function, *args) -> list[multiprocessing.Process]:
        context = multiprocessing.get_context("spawn")
        started.extend(context.Process(target=_start, args=(function, r, tmp_path, args)) for r in range(2))
        for process in started:
            process.start()
        return started

    yield start
    for process in started:
        process.kill()
        process.join()


def codes(processes, timeout: float = 30) -> list[int | None]:
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(timeout=max(0.0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def wait_for(file: Path) -> str:
    deadline = time.monotonic() + 20
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, f"no {file}"
        time.sleep(0.02)
    return file.read_text()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def said(folder: Path) -> str:
    return "".join((folder / f"stderr-{rank}").read_text() for rank in range(2))


def _fork_sleepers(folder: Path) -> None:
    """A child and its child, as a data worker that has started something."""
    if os.fork() == 0:
        child = os.fork()
        if child:
            (folder / "pids").write_text(f"{os.getpid()} {child}")
        time.sleep(1000)


def _sleep_before_a_collective(rank: int, folder: Path) -> None:
    import torch

    if rank == 1:
        _fork_sleepers(folder)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    beat = Heartbeat(folder, rank, 2, LIMIT)
    for step in (6, 7):
        beat("fetch", step, [f"sample-{step}-of-{rank}"])
        torch.distributed.all_reduce(torch.ones(1))
    beat("backward", 7, [f"sample-7-of-{rank}"])
    if rank == 1:
        time.sleep(1000)
    torch.distributed.all_reduce(torch.ones(1))


def test_rank_that_stops_is_named_and_the_job_ends(tmp_path, ranks):
    # The beats of both are the same: only that the other waits in a collective tells who is waited for.
    assert codes(ranks(_sleep_before_a_collective)) == [EXIT_HUNG, EXIT_HUNG]
    text = said(tmp_path)
    asleep, waiting = text.split("other rank(s)")
    assert "rank 1 (host" in asleep
    assert "in phase backward of step 7" in asleep
    assert "sample-7-of-1" in asleep
    assert "rank 0 (host" not in text
    assert "wait in phase backward of step 7" in waiting
    assert text.count("the job hangs") == 1
    assert str(tmp_path / "rank-*.stacks.txt") in text
    stacks = [(tmp_path / f"rank-{rank}.stacks.txt").read_text() for rank in range(2)]
    assert "in all_reduce" in stacks[0]
    assert "in _sleep_before_a_collective" in stacks[1]
    assert "sample-7-of-1" in stacks[1]
    for pid in (tmp_path / "pids").read_text().split():
        assert gone(int(pid))


def _hold_the_interpreter(rank: int, folder: Path) -> None:
    import ctypes

    with Heartbeat(folder, rank, 2, LIMIT) as beat:
        beat("forward", 3, [f"sample-of-{rank}"])
        time.sleep(0.5)
        (ctypes.PyDLL if rank == 1 else ctypes.CDLL)(None).sleep(1000)  # PyDLL: no thread of Python runs meanwhile


def test_rank_stuck_where_no_thread_runs_leaves_too(tmp_path, ranks):
    first, second = codes(ranks(_hold_the_interpreter))
    assert first == EXIT_HUNG
    assert second == 1
    assert "rank 1 (host" in said(tmp_path)
    assert "did not answer" in said(tmp_path)
    assert "sample-of-1" in said(tmp_path)
    assert "in _hold_the_interpreter" in (tmp_path / "rank-1.stacks.txt").read_text()


def _stop_at_once_in_a_save(rank: int, folder: Path) -> None:
    with Heartbeat(folder, rank, 2, LIMIT, start="this job") as beat, beat.phase("save", limit=1000):
        (folder / f"saving-{rank}").write_text(str(os.getpid()))
        while not (folder / f"saving-{1 - rank}").exists():
            time.sleep(0.001)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)  # before its file was written a second time
        time.sleep(1000)


def test_rank_that_stops_within_its_first_second_is_named(tmp_path, ranks):
    first, second = ranks(_stop_at_once_in_a_save)
    first.join(timeout=30)
    assert first.exitcode == EXIT_HUNG
    assert second.is_alive()
    assert "rank 1 (host" in said(tmp_path)
    assert "did not answer" in said(tmp_path)


def _slow(rank: int, folder: Path) -> None:
    with Heartbeat(folder, rank, 2, 1.0) as beat:
        for step in range(3):
            beat("forward", step)
            time.sleep(0.5)
        with beat.phase("save"):
            time.sleep(1.4)
        with beat.phase("evaluate", limit=5):
            time.sleep(1.2)
        beat("forward", 4)
    time.sleep(0.5 + rank)  # one ends before the other


def test_slow_run_is_let_alone_whatever_lies_in_the_folder(tmp_path, ranks):
    # What a job that hung has left: it hung, and both its ranks were told.
    (tmp_path / watchdog.HANG).write_text('{"rank": 0, "token": "old"}')
    for rank in range(2):
        (tmp_path / f"rank-{rank}.json").write_text('{"phase": "forward", "step": 9, "hung": "it stopped"}' + " " * 999)
    (tmp_path / "rank-0.stacks.txt").write_text("stacks of an earlier run")
    assert codes(ranks(_slow)) == [0, 0]
    assert said(tmp_path) == ""
    assert json.loads((tmp_path / "rank-1.json").read_text())["phase"] == "ended"
    assert (tmp_path / "rank-0.stacks.txt").read_text() == "stacks of an earlier run"
    assert not (tmp_path / "rank-1.stacks.txt").exists()


def _long_save_or_stop(rank: int, folder: Path) -> None:
    beat = Heartbeat(folder, rank, 2, LIMIT)
    beat("step", 5, ["a-sample"])
    with beat.phase("save") if rank == 0 else beat.phase("write", limit=2):
        time.sleep(1000)


def test_rank_without_a_limit_of_its_own_hears_of_the_hang(tmp_path, ranks):
    assert codes(ranks(_long_save_or_stop)) == [EXIT_HUNG, EXIT_HUNG]
    assert "told by another rank" in (tmp_path / "rank-0.stacks.txt").read_text()
    assert "it stopped" in (tmp_path / "rank-1.stacks.txt").read_text()


def _go_on(rank: int, folder: Path) -> None:
    with Heartbeat(folder, rank, 2, 2.0) as beat:
        for i in range(300):
            if (folder / "stop").exists():
                return
            beat("forward", i, [f"sample-{i}"])
            (folder / f"at-{rank}").write_text(str(i))
            time.sleep(0.1)


def test_killed_rank_is_missed(tmp_path, ranks):
    processes = ranks(_go_on)
    wait_for(tmp_path / "at-0")
    wait_for(tmp_path / "at-1")
    time.sleep(0.5)
    processes[1].kill()
    assert codes(processes) == [EXIT_HUNG, -signal.SIGKILL]
    assert "rank 1 (host" in said(tmp_path)
    assert "did not answer" in said(tmp_path)
    assert "rank 1 is silent" in (tmp_path / "rank-0.stacks.txt").read_text()


def test_suspended_job_does_not_wake_up_hanging(tmp_path, ranks):
    processes = ranks(_go_on)
    for rank in range(2):
        wait_for(tmp_path / f"at-{rank}")
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.3)  # longer than the limit, and less than faulthandler's clock, that of a stuck interpreter, waits
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)
    time.sleep(1)
    (tmp_path / "stop").write_text("")
    assert codes(processes) == [0, 0]


def test_run_goes_on_without_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "TICK_SECONDS", 0.02)
    folder = tmp_path / "watch"
    with Heartbeat(folder, 0, 2, 60) as beat:
        beat("forward", 1)
        folder.rename(tmp_path / "elsewhere")
        time.sleep(0.2)
        beat("forward", 2)


def state(rank: int, **changed) -> dict:
    same = {"host": "node-1", "pid": 10 + rank, "phase": "backward", "step": 4, "beats": 3, "idle_seconds": 600.0}
    return {"rank": rank, **same, "hung": "it stopped", "in_collective": True, "keys": [f"key-{rank}"], **changed}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({2: {"hung": None}}, [2]),
        ({3: {"phase": "fetch", "beats": 2}}, [3]),
        # Rank 1 is a step behind, though another stopped earlier.
        ({1: {"step": 3, "beats": 9}, 2: {"idle_seconds": 700.0}}, [1]),
        ({0: {"in_collective": False}, 2: {"in_collective": False}}, [0, 2]),
        ({1: {"idle_seconds": 900.0}}, [1]),
        # It left with an error while the others wait for it, or it was done and is waited for by nobody.
        ({1: {"phase": "ended", "hung": None, "in_collective": False}}, [1]),
        ({1: {"phase": "ended", "hung": None, "step": 5, "beats": 0}, 2: {"in_collective": False}}, [2]),
        ({}, [0, 1, 2, 3]),
    ],
)
def test_summary_names_who_is_waited_for(changed, named):
    states = {rank: state(rank, **changed.get(rank, {})) for rank in range(4)}
    text = summary(states, Path("/run/watchdog"))
    assert [rank for rank in range(4) if f"rank {rank} (host" in text] == named
    assert [rank for rank in range(4) if f"key-{rank}" in text] == named


def test_places_in_which_a_rank_waits_are_there():
    from deepspeed import DeepSpeedEngine

    from trainer.dist import sum_over_ranks
    from trainer.train import whole_loss

    places = [f" in {wait.__name__}\n".encode() for wait in (sum_over_ranks, whole_loss)]
    assert [b"distributed_c10d.py", *places, b" in _take_model_step\n"] == list(watchdog.COLLECTIVES)
    assert callable(DeepSpeedEngine._take_model_step)


def test_summary_of_many_ranks_stays_short():
    text = summary({rank: state(rank, keys=["k"] * 100) for rank in range(500)}, Path("/run"))
    assert "and 492 more ranks" in text
    assert len(text.splitlines()) < 15
    assert "and 92 more" in text


def test_beat_costs_nothing(tmp_path):
    with Heartbeat(tmp_path, 0, 1, 600) as beat:
        started = time.perf_counter()
        for _ in range(10000):
            beat("forward", 1, ["a"])
        assert time.perf_counter() - started < 1.0  # 100 us each, on a busy machine
