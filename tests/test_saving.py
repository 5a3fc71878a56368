"""A save lets training go on, and what goes wrong beside it is said by all ranks, with nothing lost."""

import json
import shutil
import threading
from pathlib import Path

import pytest
from ranks import run_ranks

from trainer.checkpoint import existing, tidy
from trainer.config import Config
from trainer.errors import CheckpointError
from trainer.manifest import check_whole


def start(world, config_file: str, run: str, *changes: str):
    from trainer.setup import setup

    changes = [f"run.output_dir={run}", "checkpoint.save_steps=2", "data.num_workers=0", *changes]
    return setup(Config.load(config_file, changes, world.world_size), world, "none")


def slow_and_failing(world, config_file: str, out: str) -> dict:
    """Exports that take seconds, and one that fails; what `latest` says at each step."""
    from trainer import export
    from trainer.train import train

    write = export.write

    next_step = threading.Event()

    def slowly(*args):
        assert next_step.wait(60)
        return write(*args)

    export.write = slowly
    state, found = start(world, config_file, f"{out}/slow", "train.max_steps=3"), {}
    latest, seen = Path(out, "slow", "latest"), []
    inputs = state.inputs

    def looking(batch):
        seen.append((state.step, latest.read_text().strip() if latest.exists() else None))
        if len(seen) == 6:  # two micro-batches a step: the last of step 3
            next_step.set()
        return inputs(batch)

    state.inputs = looking
    train(state)
    found["seen"] = seen
    found["after"] = latest.read_text().strip()
    state.engine.destroy()

    def failing(*args):
        if "checkpoint-000004" in str(args[3]):
            raise OSError(28, "No space left on device")
        return write(*args)

    export.write = failing
    state = start(world, config_file, f"{out}/failing", "train.max_steps=9")
    try:
        train(state)
    except CheckpointError as error:
        found["failed"] = str(error)
        found["failed at"] = state.step
    state.engine.destroy()
    return found


def held_open(world, config_file: str, out: str) -> str:
    """A run in which the folder of an old checkpoint cannot be removed, as on NFS while somebody reads a file of it."""
    from trainer import saving
    from trainer.train import train

    remove, refused = shutil.rmtree, []

    def refusing(path, ignore_errors=False):
        if "checkpoint-000002" in str(path):
            refused.append(str(path))
            (Path(path) / "state.json").unlink(missing_ok=True)  # some of it goes
            if not ignore_errors:
                raise OSError(16, "Device or resource busy")
        else:
            remove(path, ignore_errors=ignore_errors)

    saving.shutil.rmtree = refusing
    try:
        state = start(world, config_file, f"{out}/open", "train.max_steps=6", "checkpoint.keep_last=1")
        train(state)
        state.engine.destroy()
    finally:
        saving.shutil.rmtree = remove
    return refused[0] if refused else ""


def test_an_old_checkpoint_that_cannot_be_removed_stops_nothing_and_is_none_any_more(tiny_run, tmp_path):
    refused, _ = run_ranks(held_open, 2, str(tiny_run), str(tmp_path))
    assert refused
    assert [path.name for path in existing(tmp_path / "open")] == ["checkpoint-000006"]
    assert (tmp_path / "open" / "latest").read_text().strip() == "checkpoint-000006"
    left = tmp_path / "open" / ".checkpoint-000002.removed"
    assert left.is_dir()
    tidy(tmp_path / "open")  # as the next start does
    assert not left.exists()


def test_training_goes_on_while_the_export_is_written_and_hears_of_its_failure(tiny_run, tmp_path, fault):
    first, second = run_ranks(slow_and_failing, 2, str(tiny_run), str(tmp_path))
    # Saved after step 2, while step 3 runs; announced when it is whole, not before.
    assert {latest for step, latest in first["seen"] if step == 2} == {None}
    assert first["after"] == "checkpoint-000003"  # and the end waits for it
    for path in (tmp_path / "slow").glob("checkpoint-*"):
        check_whole(path)
    assert first["failed"] == second["failed"]
    assert first["failed"].startswith(f"{tmp_path}/failing/checkpoint-000004: cannot be saved (No space left")
    assert 4 <= first["failed at"] == second["failed at"] <= 6  # at the next save at the latest
    assert (tmp_path / "failing" / "latest").read_text().strip() == "checkpoint-000002"
    assert not list((tmp_path / "failing").glob(".checkpoint-*"))
    fault("disk full in an export beside training", "named on all ranks; latest is from before", equal="-")


def broken_off_in_evaluation(world, config_file: str, out: str, shards: str) -> list[int]:
    """A run that is asked to stop while it evaluates evaluates when it goes on."""
    from trainer.setup import setup
    from trainer.stopping import Stopped
    from trainer.train import evaluate, train

    settings = [f"run.output_dir={out}", f"data.eval=[{{name: e, shards: '{shards}'}}]", "eval.every_steps=2",
                "train.max_steps=3", "data.num_workers=0", "checkpoint.save_steps=2",
                "checkpoint.keep_best=true"]  # fmt: skip
    state = setup(Config.load(config_file, settings, world.world_size), world, "none")
    inputs = state.inputs

    def asked(batch):
        if not state.engine.module.training and world.rank == 1:
            state.stop.signal = "SIGTERM"
        return inputs(batch)

    state.inputs = asked
    try:
        train(state)
    except Stopped:
        stopped_at = state.step
    state.engine.destroy()
    state = setup(Config.load(config_file, settings, world.world_size), world, "auto")
    due = state.run.evaluation_due
    train(state)
    loss = evaluate(state)[0]
    state.engine.destroy()
    return [stopped_at, due, loss]


def test_an_evaluation_that_was_broken_off_is_made_up_for(tiny_run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shards = str(tiny_run.parent / "shards" / "*.tar")
    found = run_ranks(broken_off_in_evaluation, 2, str(tiny_run), str(tmp_path / "run"), shards)
    assert found[0] == found[1]
    assert found[0][:2] == [2, True]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/loss")] == [2, 3]
    losses = {event.step: event.value for event in events.Scalars("eval/loss")}
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best["checkpoint"] == f"checkpoint-00000{min(losses, key=losses.__getitem__)}"
    assert best["held_out_loss"] == pytest.approx(min(losses.values()))
    # It is made up for once: the checkpoint says so.
    state = json.loads((tmp_path / "run" / "checkpoint-000002" / "state.json").read_text())
    assert state["evaluation_due"] is False


def failed_while_saving(world, config_file: str, out: str) -> dict:
    """A run that ends by an error while a checkpoint is on its way; and checkpoints that cannot be linked."""
    from trainer import export
    from trainer.errors import DataError
    from trainer.setup import setup
    from trainer.train import train

    write, gone = export.write, threading.Event()

    def slowly(*args):
        gone.wait(3)
        return write(*args)

    export.write = slowly
    state, found = start(world, config_file, f"{out}/failed", "train.max_steps=9"), {}
    inputs = state.inputs

    def failing(batch):
        if state.step == 2:  # while step 2 is being saved
            raise DataError("the data is gone", on_all_ranks=True)
        return inputs(batch)

    state.inputs = failing
    try:
        train(state)
    except DataError:
        found["latest"] = Path(out, "failed", "latest").read_text().strip()
    state.engine.destroy()
    export.write = write

    def no_links(*_):
        raise OSError(18, "Invalid cross-device link")

    import os

    link, os.link = os.link, no_links
    state = start(world, config_file, f"{out}/copied", "train.max_steps=4")
    train(state)
    state.engine.destroy()
    os.link = link
    config = Config.load(config_file, [f"run.output_dir={out}/copied", "train.max_steps=4"], world.world_size)
    state = setup(config, world, "auto")
    found["resumed at"] = state.step
    state.engine.destroy()
    return found


def test_a_checkpoint_on_its_way_outlives_the_end_of_its_run_and_copies_do_where_links_are_not(tiny_run, tmp_path):
    first, second = run_ranks(failed_while_saving, 2, str(tiny_run), str(tmp_path))
    assert first["latest"] == second["latest"] == "checkpoint-000002"
    check_whole(tmp_path / "failed" / "checkpoint-000002")
    assert first["resumed at"] == 4
    files = [tmp_path / "copied" / f"checkpoint-00000{n}" / "hf" / "model-frozen.safetensors" for n in (2, 4)]
    assert files[0].stat().st_ino != files[1].stat().st_ino
    for file in files:
        check_whole(file.parents[1])
