"""Ranks that do not fit together, and disks without room, are refused before training, by host."""

import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import run_ranks

from trainer import preflight
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.memory import CheckpointBytes

HOST = socket.gethostname()


def refusals(world, config_file: str, folder: str) -> dict[str, str]:
    """What preflight says of each way in which rank 1 can differ from rank 0."""
    import time

    import torch

    settings = [f"run.output_dir={folder}"]
    found = {}

    def attempt(name: str, config: Config) -> None:
        try:
            preflight.preflight(config, world)
            found[name] = "fits"
        except ConfigError as error:
            found[name] = str(error)

    def load(*more: str) -> Config:
        return Config.load(config_file, [*settings, *(more if world.rank == 1 else ())], world.world_size)

    attempt("warm", load())  # the first collective of each kind connects
    started = time.monotonic()
    attempt("the same", load())
    found["seconds"] = time.monotonic() - started
    attempt("configuration", load("optim.learning_rate=0.5", "train.max_steps=7"))
    other_json = Path(folder) / "ds.json"
    if world.rank == 1:  # which alone reads it
        other_json.write_text('{"zero_optimization": {"stage": 1}}')
    attempt("DeepSpeed", load(f"deepspeed={other_json}"))

    code_hash = preflight.code_hash
    preflight.code_hash = (lambda root: "0123") if world.rank == 1 else code_hash
    attempt("code", load())
    preflight.code_hash = code_hash

    version = preflight.metadata.version
    preflight.metadata.version = lambda name: "9.9" if (name, world.rank) == ("torch", 1) else version(name)
    attempt("version", load())
    preflight.metadata.version = version

    os.environ["CXX"] = "no-such-compiler" if world.rank == 1 else sys.executable
    attempt("compiler unused", load())
    settings.append("model.fuse_elementwise=true")
    attempt("compiler", load())
    settings.pop()

    all_reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda tensor: all_reduce(tensor).__class__ if world.rank == 0 else (
        all_reduce(tensor), tensor.add_(1))  # fmt: skip
    attempt("collective", load())
    torch.distributed.all_reduce = all_reduce

    # The same relative path, each rank in a folder of its own: a disk that is not shared.
    Path(folder, f"disk-{world.rank}", "run").mkdir(parents=True)
    os.chdir(Path(folder, f"disk-{world.rank}"))
    settings = ["run.output_dir=run"]
    attempt("not shared", load())
    return found


def test_ranks_that_differ_are_refused_by_host(tiny_run, tmp_path):
    first, second = run_ranks(refusals, 2, str(tiny_run), str(tmp_path))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}  # all ranks raise, with the same words
    assert first["the same"] == "fits"
    assert first["seconds"] < 1
    where = f"on host {HOST} (rank 1)"
    assert first["configuration"].startswith(f"ranks differ from rank 0 on host {HOST}:")
    assert f"configuration optim: learning_rate is 0.5, not 0.002, {where}" in first["configuration"]
    assert first["compiler unused"] == "fits"
    assert first["compiler"].startswith("model.fuse_elementwise: torch.compile needs a C++ compiler")
    assert f"\n  - {HOST}: no-such-compiler\n" in first["compiler"]
    assert f"configuration train: max_steps is 7, not 10, {where}" in first["configuration"]
    assert "DeepSpeed's settings: zero_optimization is {'stage': 1}, not " in first["DeepSpeed"]
    assert f"code (trainer/, launch/): 0123, not {preflight.code_hash(preflight.ROOT)}, {where}" in first["code"]
    assert "torch: 9.9, not " in first["version"]
    assert f"all_reduce {where}" in first["collective"]
    assert first["not shared"].startswith(
        f"run.output_dir: {tmp_path}/disk-0/run of host {HOST} is not seen on:\n  - {HOST}\n"
    )
    assert not list(tmp_path.rglob(".shared-*"))


def test_the_hash_of_the_code_sees_contents_and_names(tmp_path):
    (tmp_path / "trainer" / "data").mkdir(parents=True)
    file = tmp_path / "trainer" / "data" / "a.py"
    file.write_text("x = 1")
    hashes = [preflight.code_hash(tmp_path)]
    file.write_text("x = 2")
    hashes.append(preflight.code_hash(tmp_path))
    file.rename(file.with_name("b.py"))
    hashes.append(preflight.code_hash(tmp_path))
    assert len(set(hashes)) == 3
    (tmp_path / "trainer" / "notes.txt").write_text("no code")
    assert preflight.code_hash(tmp_path) == hashes[-1]


def test_a_disk_without_room_for_the_coming_checkpoints_is_refused(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    settings = [f"run.output_dir={tmp_path}/run", "checkpoint.keep_last=2", "checkpoint.save_steps=1"]
    config = Config.load(tiny_run, settings)
    each, frozen, run = 1_000_000, 500_000, Path(config.run.output_dir)
    resumed = run / "checkpoint-000004"

    def with_free(free: int, last_step: int = 10, resumed_from: Path | None = None) -> None:
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
        preflight.check_disk(config, last_step, CheckpointBytes(frozen, each / 2, [each / 2]), resumed_from)

    def no_links(*_: object) -> None:
        raise OSError

    with_free(3 * each + frozen)  # two that are kept, one being written
    with pytest.raises(ConfigError) as raised:
        with_free(3 * each + frozen - 1)
    assert str(raised.value).startswith(
        f"run.output_dir: {config.run.output_dir} has 3.34 MiB free, and 3 checkpoint(s) to come need about 3.34 MiB: "
    )
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(preflight.os, "link", no_links)  # every checkpoint has a copy of the frozen weights then
        with_free(3 * (each + frozen))
        with pytest.raises(ConfigError):
            with_free(3 * (each + frozen) - 1)
    resumed.mkdir()
    with_free(2 * each, resumed_from=resumed)  # one of them is there already, and with it the frozen weights
    with pytest.raises(ConfigError):
        with_free(2 * each, resumed_from=tmp_path)  # from another run's folder, which need not be on this disk
    config.checkpoint.save_steps = 100
    with_free(each, resumed_from=resumed)  # only the last step is saved
    with pytest.raises(ConfigError, match=r"1 checkpoint\(s\) to come"):
        with_free(each - 1, resumed_from=resumed)
    config.checkpoint.save_steps, config.checkpoint.keep_last = 1, 0
    with pytest.raises(ConfigError, match=r"9 checkpoint\(s\) to come"):  # all ten are kept, one is there
        with_free(8 * each, resumed_from=resumed)
    assert [file.name for file in run.iterdir()] == ["checkpoint-000004"]
