"""The ranks of a job find one another, in a bounded time, or say who is missing.

    reach the master's port -> say who and where we are -> wait until all have -> one process group

Each rank writes its host into the store at MASTER_ADDR:MASTER_PORT, so that whoever waits can name the others. Signals
are heard all the while. What a rank alone can know (no way to the master, a port taken) it says itself.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch.distributed import PrefixStore, Store, TCPStore

from trainer.errors import ConfigError, HostError
from trainer.stopping import Stopped, StopRequest

SECONDS_VARIABLE = "TRAINER_RENDEZVOUS_SECONDS"
DEFAULT_SECONDS = 600.0
"""How long ranks wait for one another at the start, unless the environment says otherwise."""

HOSTS_VARIABLE = "TRAINER_HOSTS"
"""Hosts of the job in the order of their ranks, comma-separated, to name those that never came; job.sh sets it."""

CONNECT_SECONDS = 60.0
"""For the first connection of all with all, however late the last rank has come."""

POLL_SECONDS = 0.2
JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
"""What tells this start of this job from another job that has the same address."""


def meet(rank: int, world_size: int, local_rank: int, stop: StopRequest | None = None) -> tuple[Store, float]:
    """The store at which all ranks have met, and the seconds that are left of the time for it.

    Raises HostError, naming hosts and ranks, where that time ends first, ConfigError where hosts differ in their
    devices, and Stopped where `stop` was asked for.
    """
    deadline = time.monotonic() + limit_seconds()
    ticks = _ticks(deadline, stop)
    address = os.environ["MASTER_ADDR"], _port()
    # torchrun's agent on the first host has the store already.
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    server = _listen(address, world_size) if is_master else _connect(address, world_size, rank, ticks)
    store = PrefixStore("/".join(os.environ.get(name, "") for name in JOB_VARIABLES), server)
    own = {"host": socket.gethostname(), "local_rank": local_rank, "gpus": torch.cuda.device_count()}
    keys = [f"arrived/{other}" for other in range(world_size)]
    try:
        store.set(keys[rank], json.dumps(own))
        if store.add("arrived", 1) == world_size:
            store.set("all", "here")
        while not store.check(["all"]):  # one key: many ranks ask, and one host answers
            if next(ticks, None) is None:
                raise _incomplete(store, keys, rank)
        places = [json.loads(content) for content in store.multi_get(keys)]
    except RuntimeError as error:
        raise HostError(
            f"{_who(rank)}: the store at {_name(address)} is gone while ranks gather: rank 0 has ended, or the link to "
            f"its host; its log says more"
        ) from error
    _check_devices(places)
    return store, max(min(CONNECT_SECONDS, limit_seconds()), deadline - time.monotonic())


def limit_seconds() -> float:
    """The time for the rendezvous, from the environment. Raises ConfigError if it is no number above 0."""
    value = os.environ.get(SECONDS_VARIABLE) or str(DEFAULT_SECONDS)
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ConfigError(f"{SECONDS_VARIABLE}={value}: expected seconds, a number above 0")
    return seconds


def _ticks(deadline: float, stop: StopRequest | None) -> Iterator[float]:
    """The seconds left, again and again, until none are. Raises Stopped where that was asked for."""
    while (left := deadline - time.monotonic()) > 0:
        if stop:
            raise Stopped
        yield left
        time.sleep(min(POLL_SECONDS, left))


def _port() -> int:
    value = os.environ["MASTER_PORT"]
    if not (value.isascii() and value.isdigit() and 0 < int(value) < 65536):
        raise ConfigError(f"MASTER_PORT={value}: expected a port, from 1 to 65535")
    return int(value)


def _listen(address: tuple[str, int], world_size: int) -> TCPStore:
    try:
        return TCPStore(*address, world_size, True, wait_for_workers=False)
    except RuntimeError as error:
        raise HostError(
            f"{_who(0)} cannot listen on port {address[1]} ({error}): another job on this host may have it, of this "
            f"run even; if not, choose another, with --master_port or MASTER_PORT"
        ) from error


def _connect(address: tuple[str, int], world_size: int, rank: int, ticks: Iterator[float]) -> TCPStore:
    """The store that rank 0's host has. Its port is tried first: PyTorch's own attempts cannot be interrupted."""
    refusal: Exception | None = None
    for _ in ticks:
        try:
            socket.create_connection(address, timeout=POLL_SECONDS * 5).close()
            break
        except OSError as error:
            refusal = error
    else:
        raise HostError(
            f"{_who(rank)} does not reach the master {_name(address)} ({refusal}): rank 0 has not started, or has "
            f"ended, MASTER_ADDR and MASTER_PORT are another's, or a firewall is between"
        )
    made: list[TCPStore] = []
    failures: list[Exception] = []

    def make() -> None:
        try:
            made.append(TCPStore(*address, world_size, False, wait_for_workers=False))
        except RuntimeError as error:
            failures.append(error)

    # What listens there may be no store and never answer, and then PyTorch waits for ever.
    threading.Thread(target=make, name="rendezvous", daemon=True).start()
    for _ in ticks:
        if made:
            return made[0]
        if failures:
            break
    raise HostError(
        f"{_who(rank)}: what listens at {_name(address)} is no store of ranks: another program has the port, so choose "
        f"another, with --master_port or MASTER_PORT"
    )


def _incomplete(store: Store, keys: list[str], rank: int) -> HostError:
    """Who is missing. All who have arrived raise it, and the lowest of them says it."""
    arrived = [other for other, key in enumerate(keys) if store.check([key])]
    missing = [other for other in range(len(keys)) if other not in set(arrived)]
    here = sorted({json.loads(store.get(keys[other]))["host"] for other in arrived})
    return HostError(
        f"after {limit_seconds():g} s ({SECONDS_VARIABLE}) {len(missing)} of {len(keys)} ranks are missing: "
        f"{_shortened([_expected(other) for other in missing])}. Ranks arrived from {_shortened(here)}. Look at the "
        f"logs of the missing, and whether they reach {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        on_all_ranks=rank != min(arrived),
    )


def _expected(rank: int) -> str:
    """A rank that is not there, with its host where the environment tells."""
    hosts = [host for host in os.environ.get(HOSTS_VARIABLE, "").split(",") if host]
    ranks_per_host = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    number = rank // ranks_per_host
    return f"rank {rank} (host {hosts[number]})" if number < len(hosts) else f"rank {rank}"


def _check_devices(places: list[dict[str, Any]]) -> None:
    """Raises ConfigError, naming the hosts, where ranks have no GPU of their own while others have."""
    if not any(place["gpus"] for place in places):
        return
    lacking = [
        f"rank {rank} on host {place['host']} is number {place['local_rank']} there and sees {place['gpus']} GPU(s)"
        for rank, place in enumerate(places) if place["local_rank"] >= place["gpus"]
    ]  # fmt: skip
    if lacking:
        raise ConfigError(
            f"{len(lacking)} of {len(places)} ranks have no GPU of their own: {_shortened(lacking)}. Start one rank "
            f"for each GPU, each seeing all of its host's, and look at nvidia-smi there",
            on_all_ranks=True,
        )


def connected(rank: int, connect: Callable[[], None]) -> None:
    """Runs what connects all ranks with one another. Raises HostError, naming this host, where that fails."""
    try:
        connect()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise HostError(
            f"{_who(rank)} cannot connect to the other ranks ({reason}): hosts must resolve one another's names to "
            f"addresses that they reach; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network interface"
        ) from error


def set_timeout(timeout: timedelta) -> None:
    """How long collectives wait from now on, in all groups that there are: DeepSpeed works in some of its own."""
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        torch.distributed.distributed_c10d._set_pg_timeout(timeout, group)


def _who(rank: int) -> str:
    return f"rank {rank} on host {socket.gethostname()}"


def _name(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"


def _shortened(items: list[str], shown: int = 8) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more
