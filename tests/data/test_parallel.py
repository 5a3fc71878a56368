"""Work in processes: on the cores that are ours, and no process outlives its parent."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from trainer.data import parallel
from trainer.data.parallel import cores, in_processes
from trainer.errors import DataError


def its_process(_item: int) -> int:
    time.sleep(0.2)  # long enough for the others to take their share
    return os.getpid()


def test_the_cores_are_those_of_this_allocation(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {5}, raising=False)
    assert cores() == 1
    assert set(in_processes(its_process, range(3), "counting")) == {os.getpid()}
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert cores() == 64


def test_results_are_in_order_and_the_workers_as_many_as_asked_for(monkeypatch):
    monkeypatch.setattr(parallel, "cores", lambda: 8)
    assert list(in_processes(lambda item: item**2, range(40), "squaring")) == [item**2 for item in range(40)]
    assert len(set(in_processes(its_process, range(8), "counting", workers=2))) == 2
    assert set(in_processes(its_process, range(2), "counting", workers=1)) == {os.getpid()}


def test_without_items_nothing_is_printed(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(in_processes(its_process, [], "counting")) == []
    assert terminal.getvalue() == ""
    assert list(in_processes(its_process, [0], "counting")) == [os.getpid()]
    assert "counting" in terminal.getvalue()


def test_a_killed_worker_is_an_error_with_the_likely_reason():
    def end(_item: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DataError, match="measuring: a worker process was killed, as happens when memory runs out"):
        list(in_processes(end, range(4), "measuring", workers=2))


def test_an_error_of_a_task_is_raised_and_leaves_no_process():
    def fail(item: int) -> int:
        if item == 1:
            raise DataError("the second")
        return os.getpid()

    results = in_processes(fail, range(30), "failing", workers=2)
    process = next(results)
    with pytest.raises(DataError, match="the second"):
        list(results)
    assert not Path(f"/proc/{process}").exists()


SLEEPERS = r"""
import os, time
from trainer.data.parallel import in_processes
def sleep(item):
    os.write(1, f"{os.getpid()}\n".encode())  # whole: two that print may mix their lines
    time.sleep(600)
list(in_processes(sleep, range(2), "sleeping", workers=2))
"""


@pytest.fixture
def sleepers():
    """A process with two workers that are busy for ever, and the workers' numbers."""
    run = subprocess.Popen(
        [sys.executable, "-c", SLEEPERS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    workers: list[int] = []
    try:
        workers += [int(run.stdout.readline()) for _ in range(2)]
        yield run, workers
    finally:
        run.kill()
        for worker in filter(is_running, workers):
            os.kill(worker, signal.SIGKILL)
        run.communicate()


def is_running(process: int) -> bool:
    """Not if it has ended and only its parent has yet to hear of it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_ended(processes: list[int]) -> None:
    end = time.monotonic() + 10
    while any(map(is_running, processes)):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_workers_end_when_their_parent_is_killed(sleepers):
    run, workers = sleepers
    run.kill()
    wait_until_ended(workers)


def test_ctrl_c_is_left_to_the_parent(sleepers):
    run, workers = sleepers
    for worker in workers:  # a terminal sends it to all of them
        ignored = re.search(r"SigIgn:\t(\w+)", Path(f"/proc/{worker}/status").read_text())[1]
        assert int(ignored, 16) & 1 << (signal.SIGINT - 1)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=30)
    assert said.count("KeyboardInterrupt\n") == 1, said  # the parent's alone
    wait_until_ended(workers)
