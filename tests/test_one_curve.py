"""The loss curve is a function of data, seed and global batch alone: not of ranks, micro-batch or ZeRO stage."""

import itertools
import json
from pathlib import Path

import pytest
from ranks import run_ranks

from trainer.config import Config

STEPS = 10
STAGES = ["zero2", "zero3", "zero3_offload"]
MICRO_BATCHES = [1, 2, 4]


def curves(world, config_file: str, out: str, bf16: bool) -> dict[str, list[dict]]:
    """Metrics of the first steps, for every ZeRO stage and micro-batch, on this number of ranks."""
    from trainer.train import setup, train

    found = {}
    for stage, micro in itertools.product(STAGES, MICRO_BATCHES):
        name = f"{stage}-ranks{world.world_size}-micro{micro}"
        settings = {
            "run.output_dir": f"{out}/{name}", "deepspeed": f"ds_configs/{stage}.json",
            "train.micro_batch_size": micro, "train.bf16": str(bf16).lower(), "train.max_steps": STEPS,
            "checkpoint.save_steps": 1000, "checkpoint.keep_last": 1, "logging.sample_keys": "true",
            "model.activation_checkpointing": "false",
        }  # fmt: skip
        overrides = [f"{key}={value}" for key, value in settings.items()]
        state = setup(Config.load(config_file, overrides, world.world_size), world, "none")
        train(state)
        state.engine.destroy()
        found[name] = [json.loads(line) for line in Path(out, name, "metrics.jsonl").read_text().splitlines()]
    return found


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 2e-2)], ids=["fp32", "bf16"])
def test_curve_is_the_same_for_every_geometry(tiny_run, tmp_path, bf16, tolerance):
    found = {}
    for world_size in (1, 2):
        found |= run_ranks(curves, world_size, str(tiny_run), str(tmp_path), bf16)[0]
    assert len(found) == 2 * len(STAGES) * len(MICRO_BATCHES)
    reference = found["zero2-ranks1-micro1"]
    assert [line["step"] for line in reference] == list(range(1, STEPS + 1))
    assert reference[-1]["loss"] < reference[0]["loss"]
    for name, curve in found.items():
        for line, expected in zip(curve, reference, strict=True):
            where = f"{name}, step {line['step']}"
            assert line["samples"] == expected["samples"], where
            assert line["loss"] == pytest.approx(expected["loss"], rel=tolerance), where
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=tolerance), where
            for count in ("supervised_tokens", "tokens", "images"):
                assert line[count] == expected[count], where
