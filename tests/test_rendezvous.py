"""Ranks that do not find one another: each start ends in a bounded time, and says which host or rank it is about."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from commands import free_port

from trainer.errors import ConfigError
from trainer.rendezvous import DEFAULT_SECONDS, _check_devices, limit_seconds

HOST = socket.gethostname()
LIMIT = 3
PROGRAM = """
import sys
from trainer.stopping import Stopped, StopRequest
from trainer.errors import run_main

def main():
    with StopRequest() as stop:
        print("started", flush=True)
        from trainer.dist import barrier, distributed, world_from_environment
        with distributed(world_from_environment(), stop):
            barrier()
            print("met", flush=True)

try:
    run_main(main)
except Stopped:
    sys.exit(75)
"""


@contextmanager
def rank(number: int, port: int, **variables: str):
    """A rank of two that does nothing but look for the other."""
    place = {
        "RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TRAINER_RENDEZVOUS_SECONDS": str(LIMIT),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **place, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen, seconds: float = 60) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=seconds)
    return process.returncode, stderr.partition("\nerror: ")[2]


def test_ranks_that_all_come_meet():
    port = free_port()
    slow = {"TRAINER_RENDEZVOUS_SECONDS": "60"}  # to import PyTorch may take one of them longer
    with rank(0, port, **slow) as first, rank(1, port, **slow) as second:
        assert [process.communicate(timeout=60)[0].endswith("met\n") for process in (first, second)] == [True, True]


def test_a_host_that_never_comes_is_named():
    with rank(0, free_port(), TRAINER_HOSTS=f"{HOST},node-7") as process:
        code, said = ended(process)
    assert code == 2
    assert said.startswith(
        f"after {LIMIT} s (TRAINER_RENDEZVOUS_SECONDS) 1 of 2 ranks are missing: rank 1 (host node-7). "
        f"Ranks arrived from {HOST}."
    )


def test_a_rank_that_does_not_reach_the_master_says_so_itself():
    port = free_port()
    with rank(1, port) as process:
        code, said = ended(process)
    assert code == 2
    assert said.startswith(f"rank 1 on host {HOST} does not reach the master 127.0.0.1:{port} (")
    assert "Connection refused" in said


def test_a_port_that_another_program_has_is_named_by_all():
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()  # and never answers
        port = other.getsockname()[1]
        with rank(0, port) as first, rank(1, port) as second:
            (code, said), (second_code, second_said) = ended(first), ended(second)
    assert (code, second_code) == (2, 2)
    assert said.startswith(f"rank 0 on host {HOST} cannot listen on port {port} (")
    assert "choose another, with --master_port" in said
    assert second_said.startswith(f"rank 1 on host {HOST}: what listens at 127.0.0.1:{port} is no store of ranks")


def test_another_job_at_the_same_address_is_not_joined():
    port = free_port()
    with rank(0, port, SLURM_JOB_ID="1") as first, rank(1, port, SLURM_JOB_ID="2") as second:
        (code, said), (second_code, second_said) = ended(first), ended(second)
    assert (code, second_code) == (2, 2)
    assert "1 of 2 ranks are missing: rank 1." in said
    assert "1 of 2 ranks are missing: rank 0." in second_said or "is gone while ranks gather" in second_said


GROUPS = """
from datetime import timedelta
import torch, torch.distributed as dist
from trainer.rendezvous import set_timeout
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
groups = [dist.group.WORLD, dist.new_group([0])]  # as DeepSpeed makes one
set_timeout(timedelta(hours=3))
print([group._get_backend(torch.device("cpu")).options._timeout.seconds for group in groups])
"""


def test_all_groups_wait_as_long():
    done = subprocess.run([sys.executable, "-c", GROUPS], capture_output=True, text=True, check=True)
    assert done.stdout == "[10800, 10800]\n"


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_job_cancelled_while_it_starts_ends_at_once(number, moment):
    with rank(number, free_port(), TRAINER_RENDEZVOUS_SECONDS="600") as process:
        assert process.stdout.readline() == "started\n"
        if moment == "during":
            time.sleep(8)
        process.send_signal(signal.SIGTERM)
        code, said = ended(process, 20)
    assert (code, said) == (75, "")


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("TRAINER_RENDEZVOUS_SECONDS", value)
    with pytest.raises(ConfigError, match=rf"TRAINER_RENDEZVOUS_SECONDS={value}: expected seconds"):
        limit_seconds()
    monkeypatch.setenv("TRAINER_RENDEZVOUS_SECONDS", "")
    assert limit_seconds() == DEFAULT_SECONDS


@pytest.mark.parametrize("port", ["x", "0", "65536", "-1"])
def test_a_port_that_is_none_is_refused(port):
    with rank(1, port) as process:
        assert ended(process)[1].endswith(f"MASTER_PORT={port}: expected a port, from 1 to 65535\n")


def test_ranks_without_a_gpu_of_their_own_are_named_by_host():
    def place(host: str, local_rank: int, gpus: int) -> dict:
        return {"host": host, "local_rank": local_rank, "gpus": gpus}

    _check_devices([place("n1", 0, 0), place("n2", 0, 0)])  # a job on CPUs
    _check_devices([place("n1", 0, 2), place("n1", 1, 2)])
    with pytest.raises(ConfigError) as raised:
        _check_devices([place("n1", 0, 2), place("n1", 1, 2), place("n2", 0, 0), place("n3", 1, 1)])
    assert "rank 2 on host n2 is number 0 there and sees 0 GPU(s), rank 3 on host n3 is number 1" in str(raised.value)
