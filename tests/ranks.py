"""Runs a plain function in real processes that form a real process group."""

import multiprocessing
import os
import queue
import socket
import time
from collections.abc import Callable
from typing import Any

import torch

TIMINGS = ("step_time", "data_time", "forward_time", "backward_time", "optimizer_time", "tflops", "mfu", "hfu")
"""Keys of a line of metrics.jsonl in which equal runs differ."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


SERVER = multiprocessing.get_context("forkserver")
"""Ranks are forked from a process that has imported what they need, once for all tests, and done nothing else."""
SERVER.set_forkserver_preload(["trainer.train", "trainer.measure", "pytest"])


def _rank(function: Callable, rank: int, world_size: int, port: int, args: tuple, results: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
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
