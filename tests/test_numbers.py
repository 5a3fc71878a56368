"""A loss or gradient that is not finite: its step is skipped on all ranks and named, and too many end the run."""

import json
import math
from pathlib import Path

import pytest
import torch
from commands import ROOT
from ranks import run_ranks

from trainer.config import Config
from trainer.errors import NumbersError

STAGES = {"zero1": True, "zero2": False, "zero3": False, "zero2-offload": True}
"""Whether in bf16: there DeepSpeed has another optimizer for ZeRO-1, and sums an offloaded ZeRO-2's gradients apart."""


def disturbed(world, config_file: str, out: str) -> dict[str, str]:
    """Runs in which one thing is not a number, on the second rank alone; what their errors said."""
    import deepspeed

    from trainer.setup import setup
    from trainer.train import train

    def start(name: str, *settings: str):
        own = [f"run.output_dir={out}/{name}", "train.max_steps=6", "logging.sample_keys=true", "data.num_workers=0"]
        config = Config.load(config_file, [*own, "train.max_skipped_steps=3", *settings], world.world_size)
        return setup(config, world, "none")

    offloaded, said = json.loads((ROOT / "ds_configs" / "zero2.json").read_text()), {}
    offloaded["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    Path(out, f"{world.rank}.json").write_text(json.dumps(offloaded))
    for stage, bf16 in STAGES.items():
        file = f"{out}/{world.rank}.json" if "offload" in stage else f"ds_configs/{stage}.json"
        settings = f"deepspeed={file}", f"train.bf16={str(bf16).lower()}"
        state = start(f"image-{stage}", *settings)
        inputs, batches = state.inputs, []

        def bad_picture(batch, inputs=inputs, batches=batches):
            batches.append(batch["keys"])
            found = inputs(batch)
            if len(batches) == 3 and world.rank == 1:  # 2 micro-batches a step: the first of step 2
                found["pixel_values"][:1] = math.nan
                found["input_ids"] = found["input_ids"].clone()
            return found

        state.inputs = bad_picture
        train(state)
        if world.rank == 1:
            Path(out, f"image-{stage}", "keys.json").write_text(json.dumps(batches[2]))
        state.engine.destroy()

        state = start(f"gradient-{stage}", *settings)
        weight, calls = state.engine.module.multi_modal_projector.linear_2.bias, []

        def bad_gradient(gradient, calls=calls):
            calls.append(1)
            return gradient * math.inf if len(calls) in (3, 7) and world.rank == 1 else gradient

        weight.register_hook(bad_gradient)
        train(state)
        state.engine.destroy()

        state = start(f"weight-{stage}", *settings, "checkpoint.save_steps=1")
        train(state, until=2)
        weight = state.engine.module.language_model.transformer.ln_f.weight
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=stage == "zero3"), torch.no_grad():
            weight[0] = math.nan
        try:
            train(state)
        except NumbersError as error:
            said[stage] = str(error)
        state.engine.destroy()
    return said


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory) -> tuple[Path, list[dict[str, str]]]:
    out = tmp_path_factory.mktemp("numbers")
    return out, run_ranks(disturbed, 2, str(tiny_run), str(out), timeout=300)


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_a_picture_of_one_rank_that_is_no_number_skips_one_step_and_is_named(runs, stage, fault):
    lines = lines_of(runs[0] / f"image-{stage}")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1, 1, 1]
    culprits = json.loads((runs[0] / f"image-{stage}" / "keys.json").read_text())
    assert [line.get("not_finite") for line in lines] == [None, culprits, None, None, None, None]
    assert lines[1]["loss"] is None
    assert lines[1]["grad_norm"] is None
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] for line in lines[2:])
    fault(f"{stage}: NaN in a picture of one rank", "its step skipped on all ranks, the samples named", equal="-")


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_of_one_rank_that_is_infinite_skips_its_step_on_all(runs, stage, fault):
    # The hook runs once a micro-batch, two a step: the third call is in step 2, the seventh in step 4.
    lines = lines_of(runs[0] / f"gradient-{stage}")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 2, 2, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)
    # No loss tells whose it was, so all samples of the step are named.
    assert sorted(lines[1]["not_finite"]) == sorted(lines[1]["samples"])
    fault(f"{stage}: a gradient of one rank is infinite", "its step skipped on all ranks, named", equal="-")


@pytest.mark.parametrize("stage", STAGES)
def test_a_weight_that_is_no_number_ends_the_run_with_the_checkpoint_from_before(runs, stage, fault):
    out, said = runs
    assert len({ranks_said[stage] for ranks_said in said}) == 1  # all ranks end, with the same words
    assert "3 steps in a row, up to step 5" in said[0][stage]
    assert "train.max_skipped_steps" in said[0][stage]
    lines = lines_of(out / f"weight-{stage}")
    assert [line["step"] for line in lines if "not_finite" in line] == [3, 4, 5]
    # Saved every step, but not while steps are skipped.
    assert (out / f"weight-{stage}" / "latest").read_text().strip() == "checkpoint-000002"
    fault(f"{stage}: NaN in a weight", "ends after 3 skipped steps; the checkpoint is from before", equal="-")
