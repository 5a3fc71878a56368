"""Frozen weights stay as they are, and are on the disk once a run."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from safetensors.torch import load_file

from trainer import frozen
from trainer.config import Config
from trainer.errors import CheckpointError
from trainer.frozen import checksum, chunk_weights
from trainer.manifest import check_whole

CPU = torch.device("cpu")


@given(
    data=st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_checksums_of_parts_add_up_to_that_of_the_whole(data, cuts):
    before, frozen.CHUNK = frozen.CHUNK, 16  # so that parts begin and end inside chunks
    try:
        values = torch.tensor(data, dtype=torch.int16).view(torch.bfloat16)
        weights = chunk_weights(16, CPU)
        bounds = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
        parts = [checksum(values[a:b], a, weights) for a, b in zip(bounds, bounds[1:], strict=False)]
        assert (sum(parts) - checksum(values, 0, weights)) % 2**64 == 0
    finally:
        frozen.CHUNK = before


@given(data=st.lists(st.integers(-(2**15), 2**15 - 1), min_size=2, max_size=40), at=st.data())
@settings(max_examples=200, deadline=None)
def test_a_change_and_an_exchange_change_the_checksum(data, at):
    values = torch.tensor(data, dtype=torch.int16)
    weights = chunk_weights(len(data), CPU)
    i, j = (at.draw(st.integers(0, len(data) - 1)) for _ in range(2))
    exchanged = values.clone()
    exchanged[i], exchanged[j] = values[j], values[i]
    assert (checksum(exchanged, 0, weights) == checksum(values, 0, weights)) == bool(values[i] == values[j])
    changed = values.clone()
    changed[i] ^= 1
    assert checksum(changed, 0, weights) != checksum(values, 0, weights)


def start(world, config_file: str, run: str, *changes: str, resume: str = "none"):
    from trainer.setup import setup

    stage_1 = ["freeze=[vision_tower, language_model]", "train.max_steps=4", "checkpoint.save_steps=1"]
    changes = [f"run.output_dir={run}", "checkpoint.keep_last=0", "data.num_workers=0", *stage_1, *changes]
    return setup(Config.load(config_file, changes, world.world_size), world, resume)


def fingerprints(world, config_file: str, out: str) -> list[str]:
    found = []
    for stage in ("zero2", "zero3", "zero3_offload"):
        state = start(world, config_file, f"{out}/{world.world_size}{stage}", f"deepspeed=ds_configs/{stage}.json")
        found.append(state.saver.frozen.fingerprint)
        state.engine.destroy()
    return found


def test_the_fingerprint_is_the_same_at_every_geometry(tiny_run, tmp_path):
    found = [f for n in (1, 2) for rank in run_ranks(fingerprints, n, str(tiny_run), str(tmp_path)) for f in rank]
    assert len(found) == 9
    assert len(set(found)) == 1
    assert found[0]


def drifted(world, config_file: str, out: str, stage: str) -> str:
    """A frozen weight moves on the second rank alone."""
    from trainer.train import train

    state = start(world, config_file, f"{out}/run", f"deepspeed=ds_configs/{stage}.json")
    train(state, until=2)
    if world.rank == 1:
        weight = state.engine.module.language_model.transformer.h[1].mlp.w1.weight
        with torch.no_grad():
            getattr(weight, "ds_tensor", weight).flatten()[3:4].mul_(1.001)
    try:
        train(state, until=4)
    except CheckpointError as error:
        return str(error)
    finally:
        state.engine.destroy()
    return "saved"


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_frozen_weight_that_moves_stops_the_run_and_is_named(tiny_run, tmp_path, stage, fault):
    said = run_ranks(drifted, 2, str(tiny_run), str(tmp_path), stage)
    assert said[0] == said[1]
    assert said[0].startswith("rank 1: 1 frozen weights are not what they were")
    assert "language_model.transformer.h.1.mlp.w1.weight" in said[0]
    assert (tmp_path / "run" / "latest").read_text().strip() == "checkpoint-000002"
    fault(f"{stage}: a frozen weight moves on one rank", "named; nothing saved", equal="-")


def saved_once(world, config_file: str, out: str) -> None:
    """Two steps, on with two more at another geometry, and on from a copy of the run in another folder."""
    from trainer.train import train

    for until, stage, resume in ((2, "zero2", "none"), (4, "zero3", "auto")):
        state = start(world, config_file, f"{out}/run", f"deepspeed=ds_configs/{stage}.json", resume=resume)
        train(state, until=until)
        state.engine.destroy()
    state = start(world, config_file, f"{out}/unfrozen", "freeze=[vision_tower]")
    train(state, until=1)
    state.engine.destroy()


def new_bytes(checkpoint: Path, others: list[Path]) -> int:
    """Bytes that a checkpoint has beyond what others hold, too."""
    shared = {file.stat().st_ino for other in others for file in other.rglob("*")}
    return sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file() and f.stat().st_ino not in shared)


def test_frozen_weights_are_written_once_a_run(tiny_run, tmp_path):
    run_ranks(saved_once, 2, str(tiny_run), str(tmp_path))
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert len(checkpoints) == 4
    inodes = {(path / "hf" / "model-frozen.safetensors").stat().st_ino for path in checkpoints}
    assert len(inodes) == 1  # across the change of geometry too
    names = [set(load_file(path / "hf" / "model-trained.safetensors")) for path in checkpoints]
    projector = {f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert names == [projector] * 4
    # Whichever goes first, the others stay whole.
    shutil.rmtree(checkpoints[0])
    for path in checkpoints[1:]:
        check_whole(path)
    frozen_file = checkpoints[2] / "hf" / "model-frozen.safetensors"
    assert new_bytes(checkpoints[2], checkpoints[1:2]) == new_bytes(checkpoints[2], []) - os.path.getsize(frozen_file)
    frozen_names = set(load_file(tmp_path / "unfrozen" / "checkpoint-000001" / "hf" / "model-frozen.safetensors"))
    assert {name.split(".")[0] for name in frozen_names} == {"vision_tower"}
