"""A loss that leaps is skipped by all ranks and named; ranks out of step are named before they wait for each other."""

import json
import math
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from trainer.config import Config
from trainer.errors import DataError, NumbersError
from trainer.guard import ENOUGH, WINDOW, StepGuard

STAGES = ["zero1", "zero2", "zero3"]
"""ZeRO-1 in bf16, where DeepSpeed has another optimizer for it."""


def test_a_spike_is_told_by_the_median_of_the_last_steps():
    guard = StepGuard(2.0, 3, [1.0] * (ENOUGH - 1))
    assert not guard.is_spike(99.0)  # of too few
    guard = StepGuard(2.0, 3, [1.0] * ENOUGH)
    assert guard.is_spike(2.1)
    assert not guard.is_spike(2.0)
    assert not guard.is_spike(math.nan)  # that is another kind of trouble
    assert not StepGuard(None, 3, [1.0] * ENOUGH).is_spike(99.0)
    # The window moves on: 64 steps at 4 and the ones at 1 are forgotten.
    guard = StepGuard(2.0, 3, [1.0] * ENOUGH + [4.0] * WINDOW)
    assert not guard.is_spike(7.9)


def start(world, config_file: str, run: str, *changes: str, resume: str = "none"):
    from trainer.setup import setup

    changes = [f"run.output_dir={run}", "data.num_workers=0", "logging.sample_keys=true", *changes]
    return setup(Config.load(config_file, changes, world.world_size), world, resume)


def spiked(world, config_file: str, out: str, stage: str) -> list:
    """From step 21 on, the second rank finds its samples five times as unlikely."""
    from trainer.train import train

    settings = [f"deepspeed=ds_configs/{stage}.json", "train.max_steps=40", "train.max_loss_ratio=2",
                "train.max_skipped_steps=3", "optim.warmup_ratio=0", "checkpoint.save_steps=20",
                f"train.bf16={str(stage == 'zero1').lower()}"]  # fmt: skip
    state = start(world, config_file, f"{out}/run", *settings)
    train(state, until=20)
    state.engine.destroy()
    # The guard goes on from the checkpoint with the losses of the steps before.
    state = start(world, config_file, f"{out}/run", *settings, resume="auto")
    found = [list(state.guard.recent_losses)]

    def unlikely(_module, _inputs, output):
        output.loss = output.loss * 5

    if world.rank == 1:
        state.engine.module.register_forward_hook(unlikely)
    weight = state.engine.module.multi_modal_projector.linear_2.bias
    before = getattr(weight, "ds_tensor", weight).detach().clone()
    try:
        train(state)
    except NumbersError as error:
        found.append(str(error))
    found.append(torch.equal(before, getattr(weight, "ds_tensor", weight)))
    state.engine.destroy()
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_leaps_changes_nothing_and_ends_the_run_if_it_stays(tiny_run, tmp_path, stage, fault):
    first, second = run_ranks(spiked, 2, str(tiny_run), str(tmp_path), stage)
    assert first == second
    recent, said, unchanged = first
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert recent == [line["loss"] for line in lines[:20]]
    assert "3 steps in a row, up to step 23, were skipped" in said
    assert unchanged
    assert [line["step"] for line in lines if "loss_spike" in line] == [21, 22, 23]
    for line in lines[20:]:
        assert line["grad_norm"] is None
        assert 0 < len(line["loss_spike"]) <= 2  # the worst micro-batch
        assert set(line["loss_spike"]) < set(line["samples"])
    assert (tmp_path / "run" / "latest").read_text().strip() == "checkpoint-000020"
    fault(f"{stage}: a loss that leaps", "skipped on all ranks, the worst samples named", equal="-")


def out_of_step(world, config_file: str, out: str, stage: str) -> str:
    """The second rank cuts its share into smaller micro-batches, and so has more of them."""
    import dataclasses

    from trainer.train import train

    state = start(world, config_file, f"{out}/run", f"deepspeed=ds_configs/{stage}.json")
    if world.rank == 1:
        state.geometry = dataclasses.replace(state.geometry, micro_batch_size=1)
    try:
        train(state)
    except DataError as error:
        return str(error)
    finally:
        state.engine.destroy()
    return "trained"


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_with_different_numbers_of_micro_batches_are_named(tiny_run, tmp_path, stage, fault):
    first, second = run_ranks(out_of_step, 2, str(tiny_run), str(tmp_path), stage, timeout=120)
    assert first == second
    assert first.startswith("step 1: the ranks have different numbers of micro-batches")
    assert "rank 0: 2 with s" in first
    assert "rank 1: 4 with s" in first
    assert not (Path(tmp_path) / "run" / "latest").exists()
    fault(f"{stage}: ranks with different numbers of batches", "named with their samples", equal="-")
