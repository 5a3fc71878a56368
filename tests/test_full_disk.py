"""A disk that fills up, or goes away, while a checkpoint is written: named on all ranks, and nothing is lost."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from ranks import run_ranks

from trainer.checkpoint import find_resume
from trainer.config import Config
from trainer.errors import CheckpointError
from trainer.manifest import check_whole

STAGES = ["zero2", "zero3"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few MiB."""
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def trained_on_a_small_disk(world, config_file: str, folder: str, stage: str) -> dict:
    """Saves at step 1, fills the disk but for a little, and saves again; then makes room and goes on."""
    from trainer.dist import barrier
    from trainer.setup import setup
    from trainer.train import train

    settings = [f"run.output_dir={folder}/run", "checkpoint.save_steps=1", "checkpoint.keep_last=0",
                "train.max_steps=3", "data.num_workers=0", f"deepspeed=ds_configs/{stage}.json"]  # fmt: skip

    def start(resume: str):
        return setup(Config.load(config_file, settings, world.world_size), world, resume)

    state, found = start("none"), {}
    train(state, until=1)
    filler = Path(folder, "filler")
    if world.is_main:
        free = shutil.disk_usage(folder).free
        filler.write_bytes(bytes(free - 300_000))  # of a checkpoint's megabyte, not even one rank's part fits
    barrier()
    try:
        train(state, until=2)
    except CheckpointError as error:
        found["full"] = str(error)
    state.engine.destroy()
    barrier()
    if world.is_main:
        found["left"] = sorted(path.name for path in Path(folder, "run").glob("*checkpoint*"))
        found["resumes from"] = find_resume(Path(folder, "run"), "auto")
        filler.unlink()
    barrier()
    state = start("auto")
    found["goes on at"] = state.step
    train(state)
    state.engine.destroy()
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(tiny_run, small_disk, stage, fault):
    first, second = run_ranks(trained_on_a_small_disk, 2, str(tiny_run), str(small_disk), stage, timeout=300)
    run = small_disk / "run"
    assert first["full"] == second["full"]
    assert first["full"].startswith(f"{run}/checkpoint-000002: cannot be saved (")
    assert "cannot be saved (No space left on device)" in first["full"]
    assert "--resume auto goes on from the last whole one" in first["full"]
    assert first["left"] == ["checkpoint-000001"]
    assert first["resumes from"] == run / "checkpoint-000001"
    assert (first["goes on at"], second["goes on at"]) == (1, 1)
    for step in (1, 2, 3):
        check_whole(run / f"checkpoint-00000{step}")
    fault(f"{stage}: disk full in a save", "named on all ranks; resumed from the checkpoint before", equal="-")


def trained_where_the_folder_vanishes(world, config_file: str, folder: str) -> str:
    from trainer.dist import barrier
    from trainer.setup import setup
    from trainer.train import save, train

    settings = [f"run.output_dir={folder}", "train.max_steps=3", "data.num_workers=0"]
    state = setup(Config.load(config_file, settings, world.world_size), world, "none")

    class Quiet:
        def pause(self, *_):
            pass

    barrier()
    if world.is_main:
        shutil.rmtree(folder)
    barrier()
    try:
        from trainer.watchdog import Heartbeat

        with Heartbeat(Path(f"{folder}-beats"), world.rank, world.world_size, 600) as state.beat:
            save(state, Quiet())  # type: ignore[arg-type]
    except CheckpointError as error:
        return str(error)
    finally:
        state.engine.destroy()
    train(state)
    return "saved"


def test_a_folder_that_vanished_is_named_on_all_ranks(tiny_run, tmp_path, fault):
    said = run_ranks(trained_where_the_folder_vanishes, 2, str(tiny_run), str(tmp_path / "run"), timeout=300)
    assert len(set(said)) == 1
    assert said[0].startswith(f"{tmp_path}/run/checkpoint-000000: cannot be saved (No such file or directory)")
    fault("the run folder vanished", "named on all ranks", equal="-")
