"""Who this process is among the others, and the few things they do together."""

import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from tqdm import tqdm

from trainer import rendezvous
from trainer.cores import cores
from trainer.errors import ConfigError, DataError, UserError
from trainer.stopping import StopRequest

log = logging.getLogger("trainer")
"""Logs on rank 0 alone, once `distributed` has begun."""


TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the others: rank 0 may index millions of samples, or write a large export, alone."""


@dataclass(frozen=True)
class World:
    """Place of this process in the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def world_from_environment() -> World:
    """The place that a launcher (deepspeed, torchrun, srun) has put into the environment; without one, a job alone.

    Raises ConfigError, naming the variables, where only some are set or one is no number.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not os.environ.get("RANK") and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        os.environ.update({name: os.environ[variable] for name, variable in slurm.items()})
        # "2(x3),1": of hosts that differ, the first counts; it only settles how many threads a rank has.
        if tasks := re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
            os.environ["LOCAL_WORLD_SIZE"] = tasks[0]
    values = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not values.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        return World()
    if missing := [name for name in names if name not in values]:
        raise ConfigError(
            f"the environment sets {', '.join(sorted(values))} but not {', '.join(missing)}: start with `deepspeed` "
            f"or `torchrun`, which set them all (under `srun`, export MASTER_ADDR and MASTER_PORT), or unset them to "
            f"run one process."
        )
    try:
        world = World(int(values["RANK"]), int(values["WORLD_SIZE"]), int(values["LOCAL_RANK"]))
    except ValueError as error:
        raise ConfigError(f"the environment's RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}") from error
    if not 0 <= world.rank < world.world_size or world.local_rank < 0:
        raise ConfigError(f"the environment makes this rank {world.rank} of {world.world_size}, which cannot be")
    return world


class _BesideProgressBar(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a terminal that was closed is no reason to lose what the run has to save
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


@contextmanager
def distributed(world: World, stop: StopRequest | None = None) -> Iterator[World]:
    """The process group of the job, from start to a clean end.

    Raises HostError, naming hosts, where not all ranks find one another in time, and Stopped where `stop` was asked for
    before they have.
    """
    import deepspeed

    logging.basicConfig(
        format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[_BesideProgressBar()], force=True
    )
    log.setLevel(logging.INFO if world.is_main else logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's calls of names that PyTorch is about to rename: nothing a user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if world.world_size == 1 and not os.environ.get("RANK"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        os.environ.update(place, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if world.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Ranks of one host would each start a thread per core and wait for one another.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world.world_size)))
        torch.set_num_threads(max(1, min(cores(), (os.cpu_count() or 1) // ranks_here)))
    # On a CPU, DeepSpeed would compile a shared-memory collective at the first start; a process killed while it does
    # leaves a lock on which every later run waits for ever. Gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    store, seconds = rendezvous.meet(world.rank, world.world_size, world.local_rank, stop)
    rendezvous.connected(world.rank, lambda: _make_group(world, backend, store, timedelta(seconds=seconds)))
    deepspeed.init_distributed(backend, timeout=TIMEOUT, auto_mpi_discovery=False, verbose=False)
    try:
        yield world
    finally:
        torch.distributed.destroy_process_group()


def _make_group(world: World, backend: str, store: torch.distributed.Store, timeout: timedelta) -> None:
    """The process group, every rank connected with every other in no more than the given time."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    torch.distributed.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout
    )
    barrier()
    rendezvous.set_timeout(TIMEOUT)


def barrier() -> None:
    """Waits for all ranks."""
    torch.distributed.barrier()


def on_main_rank(world: World, task: Callable[[], Any]) -> Any:
    """Runs a task on rank 0 while the others wait; its result, on all ranks. If it fails there with a user's error, all
    ranks raise it."""
    result: list[Any] = [None]

    def run() -> None:
        result[0] = task()

    on_ranks(world.is_main, run)
    torch.distributed.broadcast_object_list(result)
    return result[0]


def on_each_host(world: World, task: Callable[[], None]) -> None:
    """Runs a task on rank 0 and then, where it finds nothing left to do unless its disk is its own, on each host."""
    on_main_rank(world, task)
    on_ranks(world.local_rank == 0 and not world.is_main, task)


def on_ranks(chosen: bool, task: Callable[[], None]) -> None:
    """Runs a task on the chosen ranks while the others wait. If one fails with a user's error, all ranks raise it."""
    failure: UserError | None = None
    if chosen:
        try:
            task()
        except UserError as error:
            failure = error
    raise_together(failure)


def gather(own: Any) -> list[Any]:
    """The values of all ranks, by rank."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, own)
    return values


def raise_together(failure: UserError | None) -> None:
    """Raises, on all ranks, the error that one of them has met. All ranks call this."""
    for found in gather(failure):
        if found is not None:
            found.on_all_ranks = True
            raise found


def check_same(what: str, value: str) -> None:
    """Raises DataError, naming the ranks, where a value is not the same on all of them. All ranks call this."""
    values = gather(value)
    differing = [rank for rank, other in enumerate(values) if other != values[0]]
    if differing:
        ranks = ", ".join(map(str, differing[:8])) + (", ..." if len(differing) > 8 else "")
        raise DataError(
            f"{what} differ between rank 0 and rank(s) {ranks}: the same paths must hold the same on every host",
            on_all_ranks=True,
        )


def ask_ranks(flag: bool, device: torch.device) -> torch.Tensor:
    """Asks whether any rank has a flag up: above 0 where one has. The answer is on its way: to look at it waits for it.
    All ranks call this."""
    asked = torch.full((), float(flag), device=device)  # filled there: nothing waits for a copy
    torch.distributed.all_reduce(asked)
    return asked


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sums over all ranks, in fp64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.tolist()
