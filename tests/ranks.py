"""Runs plain functions and commands in processes of their own that have imported what they need."""

import multiprocessing
import multiprocessing.connection
import os
import queue
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from commands import ROOT, free_port

TIMINGS = ("step_time", "data_time", "forward_time", "backward_time", "optimizer_time", "tflops", "mfu", "hfu")
"""Keys of a line of metrics.jsonl in which equal runs differ."""


SERVER = multiprocessing.get_context("forkserver")
"""Ranks are forked from a process that has imported what they need, once for all tests, and done nothing else."""
SERVER.set_forkserver_preload(["trainer.train", "trainer.measure", "pytest"])


def place(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables in which a launcher says who a process is."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {name: str(value) for name, value in {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}


def _rank(function: Callable, rank: int, world_size: int, port: int, args: tuple, results: Any) -> None:
    os.environ.update(place(rank, world_size, port))
    torch.set_num_threads(1)  # the models are tiny
    from trainer.dist import distributed, world_from_environment

    with distributed(world_from_environment()) as world:
        results.put((rank, function(world, *args)))


def run_ranks(function: Callable, world_size: int, *args: Any, timeout: float = 600) -> list[Any]:
    """`function(world, *args)` on so many ranks; their results by rank. A rank that fails or hangs fails the test."""
    results, port = SERVER.Queue(), free_port()
    processes = [
        SERVER.Process(target=_rank, args=(function, rank, world_size, port, args, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(found) < world_size:
            try:
                rank, result = results.get(timeout=1)
                found[rank] = result
            except queue.Empty:
                codes = [process.exitcode for process in processes]
                assert not any(codes), f"exit codes of the ranks: {codes}"
                assert time.monotonic() < deadline, f"ranks still running after {timeout} s; done: {sorted(found)}"
        for process in processes:
            process.join(timeout=60)
            assert process.exitcode == 0, f"a rank left with {process.exitcode}"
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(world_size)]


def _script(path: str, args: list[str], environment: dict[str, str], streams: list[str]) -> None:
    for descriptor, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [path, *args]
    runpy.run_path(str(ROOT / path), run_name="__main__")


def script(path: str, *args: str, timeout: float = 600, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of launch/ by itself, with its output kept, as `command` does, in a twentieth of the time: what it
    imports is there.

    variables: of the environment, beside this process's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        environment = {**os.environ, **variables}
        process = SERVER.Process(target=_script, args=(path, list(args), environment, [str(s) for s in streams]))
        process.start()
        process.join(timeout)
        hangs = process.exitcode is None
        process.kill()
        process.join()
        said = [stream.read_text() if stream.exists() else "" for stream in streams]
        assert not hangs, f"still running after {timeout} s:\n{said}"
        return subprocess.CompletedProcess([path, *args], process.exitcode, *said)


def train_ranks(log: Path, *args: str, world_size: int = 2, timeout: float = 300) -> int:
    """`launch/train.py` with these arguments on so many ranks, as under a launcher, which takes thrice the time to
    start: the exit code that it would have. What they say is in `log`."""
    port, streams = free_port(), [str(log), str(log)]
    environments = [{**os.environ, **place(rank, world_size, port)} for rank in range(world_size)]
    processes = [
        SERVER.Process(target=_script, args=("launch/train.py", list(args), environment, streams))
        for environment in environments
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    try:
        while any(process.exitcode is None for process in processes):
            if failed := [process.exitcode for process in processes if process.exitcode]:
                for process in processes:  # a rank that fails with the others has a word to say
                    process.join(10)
                return failed[0]
            assert time.monotonic() < deadline, f"still running after {timeout} s:\n{log.read_text()[-3000:]}"
            multiprocessing.connection.wait([process.sentinel for process in processes if process.is_alive()], 1)
        return max(process.exitcode or 0 for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
