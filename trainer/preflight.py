"""Before training: do the ranks of this job fit together, and is there room for what they will save?

    preflight(config, world)       versions, code, configuration, run folder, collectives: the same everywhere?
    check_disk(config, bytes)      once the model is known: room for the coming checkpoints?

A host that differs is named, with what it has and what rank 0 has.
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed

from trainer.checkpoint import existing
from trainer.config import Config
from trainer.dist import World, gather, log, on_main_rank
from trainer.engine import deepspeed_settings
from trainer.errors import ConfigError
from trainer.memory import CheckpointBytes, format_bytes, most_checkpoints
from trainer.paths import ROOT

PACKAGES = ("torch", "deepspeed", "transformers", "peft")
SHOWN = 8
"""Differences in a message; there may be hundreds of ranks."""

VISIBLE_SECONDS = 5.0
"""In which a file that one host has made must be seen by the others: shared file systems cache what is not there."""


def preflight(config: Config, world: World) -> None:
    """Raises ConfigError, on all ranks and naming hosts, where this job would not train as one. All ranks call this."""
    started = time.monotonic()
    hosts = gather(socket.gethostname())
    _check_same_facts(hosts, gather(facts(config, world)))
    if config.model.fuse_elementwise:
        _check_compiler(hosts)
    _check_shared(Path(config.run.output_dir), world, hosts)
    _check_collectives(world, hosts)
    seconds = time.monotonic() - started
    log.info("%d rank(s) on %d host(s) fit together (checked in %.1f s)", len(hosts), len(set(hosts)), seconds)


def facts(config: Config, world: World) -> dict[str, str]:
    """What must be the same on all ranks, each under the name by which a user knows it."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "GPU": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "none",
        "code (trainer/, launch/)": code_hash(ROOT),
        **{f"configuration {key}": json.dumps(value) for key, value in config.to_dict().items()},
        "DeepSpeed's settings": json.dumps(deepspeed_settings(config, world), sort_keys=True, default=str),
    }


def code_hash(root: Path) -> str:
    """Of the sources in trainer/ and launch/, their names and what is in them."""
    digest = hashlib.sha256()
    for file in sorted(file for folder in ("trainer", "launch") for file in (root / folder).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _check_same_facts(hosts: list[str], found: list[dict[str, str]]) -> None:
    differing = [
        f"{name}: {_differences(found[rank][name], found[0][name])} on host {hosts[rank]} (rank {rank})"
        for name in found[0] for rank in range(len(found)) if found[rank][name] != found[0][name]
    ]  # fmt: skip
    if differing:
        raise _refused(
            f"ranks differ from rank 0 on host {hosts[0]}", differing, "install and copy the same everywhere"
        )


def _differences(here: str, there: str) -> str:
    """Two values, or what differs within two sections of a configuration."""
    try:
        mine, others = json.loads(here), json.loads(there)
    except ValueError:
        mine = others = None
    if not (isinstance(mine, dict) and isinstance(others, dict)):
        return f"{here}, not {there},"
    keys = [key for key in {**mine, **others} if mine.get(key) != others.get(key)]
    return "; ".join(f"{key} is {mine.get(key)}, not {others.get(key)}," for key in keys)


def _check_compiler(hosts: list[str]) -> None:
    compiler = os.environ.get("CXX") or "g++"  # as torch.compile has it
    found = gather(None if shutil.which(compiler) else compiler)
    missing = sorted({f"{host}: {name}" for host, name in zip(hosts, found, strict=True) if name})
    if missing:
        raise _refused(
            "model.fuse_elementwise: torch.compile needs a C++ compiler, and these are not on the PATH", missing,
            "install it there, name another with CXX, or leave the setting out",
        )  # fmt: skip


def _check_shared(output_dir: Path, world: World, hosts: list[str]) -> None:
    def make() -> Path:
        probe = output_dir.resolve() / f".shared-{uuid.uuid4().hex}"
        probe.write_text("")
        return probe

    probe = on_main_rank(world, make)
    is_seen = gather(_appears(output_dir / probe.name))
    on_main_rank(world, probe.unlink)
    blind = sorted({host for host, seen in zip(hosts, is_seen, strict=True) if not seen})
    if blind:
        raise _refused(
            f"run.output_dir: {probe.parent} of host {hosts[0]} is not seen on", blind,
            "put it on a file system that all hosts share",
        )  # fmt: skip


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _check_collectives(world: World, hosts: list[str]) -> None:
    """Each kind that training uses, with numbers whose results are known."""
    size = world.world_size

    def numbers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=world.device)

    def all_reduce() -> torch.Tensor:
        torch.distributed.all_reduce(tensor := numbers([world.rank + 1]))
        return tensor

    def broadcast() -> torch.Tensor:
        torch.distributed.broadcast(tensor := numbers([world.rank + 7]), src=0)
        return tensor

    def all_gather() -> torch.Tensor:
        gathered = numbers([0] * size)
        torch.distributed.all_gather_into_tensor(gathered, numbers([world.rank + 1]))
        return gathered

    def reduce_scatter() -> torch.Tensor:
        own = numbers([0])
        torch.distributed.reduce_scatter_tensor(own, numbers([rank + 1 for rank in range(size)]))
        return own

    expected: dict[Callable[[], torch.Tensor], list[int]] = {
        all_reduce: [size * (size + 1) // 2],
        broadcast: [7],
        all_gather: [rank + 1 for rank in range(size)],
        reduce_scatter: [size * (world.rank + 1)],
    }
    wrong = [collective.__name__ for collective, right in expected.items() if collective().tolist() != right]
    failures = [
        f"{name} on host {host} (rank {rank})"
        for rank, (host, names) in enumerate(zip(hosts, gather(wrong), strict=True)) for name in names
    ]  # fmt: skip
    if failures:
        raise _refused("collectives give wrong numbers", failures, "look at the network and drivers there")


def _refused(what: str, items: list[str], way_out: str) -> ConfigError:
    more = f"\n  - and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    listed = "".join(f"\n  - {item}" for item in items[:SHOWN])
    return ConfigError(f"{what}:{listed}{more}\n{way_out}", on_all_ranks=True)


def check_disk(config: Config, last_step: int, sizes: CheckpointBytes, resumed_from: Path | None) -> None:
    """Raises ConfigError, naming the folder, where the disk has no room for the coming checkpoints.

    Room is wanted for those that are kept and the one being written; of those that are there already, as many fewer.
    Frozen weights are written once, unless the run goes on from a checkpoint in this folder; without links, each time.
    """
    folder = Path(config.run.output_dir)
    count = max(1, most_checkpoints(config.checkpoint, last_step) - len(existing(folder)))
    if _has_links(folder):
        frozen = 0.0 if resumed_from and resumed_from.parent.samefile(folder) else sizes.frozen
    else:
        frozen = count * sizes.frozen
    needed, free = frozen + count * sizes.each, shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"run.output_dir: {folder.resolve()} has {format_bytes(free)} free, and {count} checkpoint(s) to come need "
            f"about {format_bytes(needed)}: make room, choose another folder, or keep fewer (checkpoint.keep_last)"
        )


def _has_links(folder: Path) -> bool:
    """Whether a file in this folder can have a second name."""
    probe, second = (folder / f".link-{uuid.uuid4().hex}" for _ in range(2))
    probe.write_text("")
    try:
        os.link(probe, second)
        second.unlink()
        return True
    except OSError:
        return False
    finally:
        probe.unlink()
