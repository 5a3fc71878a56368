"""The loss curve is a function of data, seed and global batch alone: not of ranks, micro-batch or ZeRO stage."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks

from trainer.config import Config

STEPS = 10
STAGES = ["zero1", "zero2", "zero3", "zero3_offload"]
COUNTS = ("supervised_tokens", "tokens", "images", "truncated_tokens", "bad_samples")

MODES = {
    # Eight samples a step; micro-batches of 1, 2 and 4 on one rank and on two.
    "samples": ([], [f"train.micro_batch_size={n}" for n in (1, 2, 4)]),
    # Four packs of at most 128 tokens a step.
    "packs": (
        ["data.packing=true", "train.global_batch_size=4"],
        [f"train.micro_batch_size={n}" for n in (1, 2)],
    ),
    # The same packs: plainly, with activations recomputed in every second layer, with fused functions.
    "how it is computed": (
        ["data.packing=true", "train.global_batch_size=4", "train.micro_batch_size=1"],
        ["data.num_workers=0", "model.activation_checkpointing=2"]
        + ["model.fuse_elementwise=true"] * bool(shutil.which("g++")),
    ),
    # Samples of like length together: the micro-batches of a step differ in number and size.
    "token budget": ([], [f"train.micro_batch_tokens={n}" for n in (128, 300)]),
}  # fmt: skip
"""Settings of a way to make rows, and those that must not change the curve."""


def curves(world, config_file: str, out: str, bf16: bool, mode: str, stages: list[str]) -> dict[str, list[dict]]:
    """Metrics of the first steps, for every ZeRO stage and micro-batch, on this number of ranks."""
    from trainer.setup import setup
    from trainer.train import train

    found = {}
    fixed, cuts = MODES[mode]
    for stage, (number, cut) in itertools.product(stages, enumerate(cuts)):
        name = f"{stage}-ranks{world.world_size}-cut{number}"
        settings = {
            "run.output_dir": f"{out}/{name}", "deepspeed": f"ds_configs/{stage}.json",
            "train.bf16": str(bf16).lower(), "train.max_steps": STEPS,
            "checkpoint.save_steps": 1000, "checkpoint.keep_last": 1, "logging.sample_keys": "true",
            "model.activation_checkpointing": "false",
        }  # fmt: skip
        overrides = [*(f"{key}={value}" for key, value in settings.items()), *fixed, cut]
        state = setup(Config.load(config_file, overrides, world.world_size), world, "none")
        train(state)
        state.engine.destroy()
        found[name] = [json.loads(line) for line in Path(out, name, "metrics.jsonl").read_text().splitlines()]
    return found


@pytest.mark.parametrize(
    ("mode", "bf16", "tolerance"),
    [
        ("samples", False, 1e-5),
        pytest.param("samples", True, 2e-2, marks=pytest.mark.long),
        pytest.param("packs", False, 1e-5, marks=pytest.mark.long),
        pytest.param("packs", True, 2e-2, marks=pytest.mark.long),
        ("how it is computed", False, 1e-5),
        pytest.param("token budget", False, 1e-5, marks=pytest.mark.long),
    ],
)
def test_curve_is_the_same_for_every_geometry(tiny_run, tmp_path, mode, bf16, tolerance):
    found = {}
    for world_size in (1, 2):
        found |= run_ranks(curves, world_size, str(tiny_run), str(tmp_path), bf16, mode, STAGES)[0]
    assert len(found) == 2 * len(STAGES) * len(MODES[mode][1])
    reference = found["zero2-ranks1-cut0"]
    assert [line["step"] for line in reference] == list(range(1, STEPS + 1))
    assert reference[-1]["loss"] < reference[0]["loss"]
    for name, curve in found.items():
        for line, expected in zip(curve, reference, strict=True):
            where = f"{name}, step {line['step']}"
            assert line["samples"] == expected["samples"], where
            assert line["loss"] == pytest.approx(expected["loss"], rel=tolerance), where
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=tolerance), where
            for count in COUNTS:
                assert line[count] == expected[count], where


def test_a_token_budget_leaves_the_curve_of_plain_batches(tiny_run, tmp_path):
    # The same samples a step, only put together otherwise.
    plain, budget = (
        run_ranks(curves, 1, str(tiny_run), str(tmp_path / mode), False, mode, ["zero2"])[0]["zero2-ranks1-cut0"]
        for mode in ("samples", "token budget")
    )
    assert [line["samples"] for line in budget] == [line["samples"] for line in plain]
    assert [line["loss"] for line in budget] == pytest.approx([line["loss"] for line in plain], rel=1e-5)
