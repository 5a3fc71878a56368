"""Predicted bytes against a real engine on two ranks: what it holds between backward and step, and what it saves."""

import json
from pathlib import Path

import pytest
from commands import ROOT
from ranks import run_ranks
from shapes import write_small_run

from trainer.checkpoint import existing, name_of
from trainer.config import CheckpointConfig, Config
from trainer.memory import format_bytes, most_checkpoints, parse_bytes
from trainer.saving import note_best, remove_old

FREEZE = {
    "align": "[vision_tower, language_model]",
    "upper layer": "[vision_tower, language_model.layers.0-0]",
    "instruct": "[vision_tower]",
    "everything": "[post_layernorm]",
}
ZERO = {name: f"deepspeed=ds_configs/{name}.json" for name in ("zero2", "zero3", "zero3_offload")}

ZERO_1 = json.loads((ROOT / "ds_configs" / "zero1.json").read_text())

OTHERS = {
    "zero1 fp32": ZERO_1,
    "zero1 bf16": ZERO_1,
    "zero2 sums bf16": {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}},
}
"""Less common ways, each under a name that ends in the type."""

LORA = {
    "zero2 lora fp32": ["train.bf16=false"],
    "zero2 lora alone bf16": ["train.bf16=true", "freeze=[vision_tower, projector]"],
    "zero3 lora bf16": ["train.bf16=true"],
}

OFFLOADED = {
    f"zero{stage} offload {dtype}": {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
    for stage, dtype in ((1, "fp32"), (2, "fp32"), (2, "bf16"))
}
"""ZeRO-1 in bf16 is left out: the engine's sums are views of its bucket there, and cannot be told from it."""


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Path:
    return write_small_run(tmp_path_factory.mktemp("small"))


def engine_bytes(world, config_file: str, out: str, runs: dict[str, list[str]]) -> dict:
    """Of each run: predicted and held bytes, and the sizes of the files of its checkpoint."""
    from trainer.engine import deepspeed_settings
    from trainer.freeze import freeze
    from trainer.load import meta_model
    from trainer.measure import held
    from trainer.memory import Sharding, checkpoint_bytes
    from trainer.setup import setup
    from trainer.train import train

    found = {}
    for name, settings in runs.items():
        config = Config.load(config_file, [f"run.output_dir={out}/{name}", *settings], world.world_size)
        state, seen = setup(config, world, "none"), []
        step = state.engine.step
        # The engine is asked to step after every micro-batch's backward pass.
        state.engine.step = lambda step=step, state=state, seen=seen: (seen.append(held(state.engine)), step())
        train(state)
        with_states = held(state.engine).optimizer  # the moments come with the first step
        files = {file.name: file.stat().st_size for file in Path(out, name).glob("checkpoint*/*/*")}
        state.engine.destroy()

        model = meta_model(config, state.tokenizer)
        freeze(model, config.freeze)
        sharding = Sharding.of(model, config.optim, deepspeed_settings(config, world), world.world_size)
        found[name] = {
            "held": (seen[-1].weights, max(moment.gradients for moment in seen), with_states),
            "states": sharding.states(), "checkpoint": checkpoint_bytes(sharding), "files": files,
        }  # fmt: skip
    return found


@pytest.fixture(scope="module")
def found(small_run, tmp_path_factory) -> list[dict]:
    runs = {
        f"{zero} {freeze} {'bf16' if bf16 else 'fp32'}": [
            ZERO[zero], f"freeze={FREEZE[freeze]}", f"train.bf16={str(bf16).lower()}",
        ]
        for zero in ("zero2", "zero3") for freeze in FREEZE for bf16 in (False, True)
    }  # fmt: skip
    for name, settings in LORA.items():
        runs[name] = [ZERO[name.split()[0]], "lora={r: 48, target_modules: c_attn|c_proj|w1|w2}", *settings]
    runs["zero3_offload instruct bf16"] = [ZERO["zero3_offload"], "train.bf16=true"]
    out = tmp_path_factory.mktemp("runs")
    for name, settings in (OTHERS | OFFLOADED).items():
        (out / f"{name}.json").write_text(json.dumps(settings))
        runs[name] = [f"deepspeed={out}/{name}.json", f"train.bf16={str(name.endswith('bf16')).lower()}"]
    return run_ranks(engine_bytes, 2, str(small_run), str(out), runs, timeout=500)


NAMES = [f"{zero} {freeze} {dtype}" for zero in ("zero2", "zero3") for freeze in FREEZE for dtype in ("fp32", "bf16")]


@pytest.mark.parametrize("name", [*NAMES, *LORA, *OTHERS])
def test_an_engine_holds_what_was_planned(found, name):
    states = found[0][name]["states"]
    for i, planned in enumerate((states.weights, states.gradients, states.optimizer)):
        # The plan is of the fullest rank.
        assert max(rank[name]["held"][i] for rank in found) == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("name", ["zero3_offload instruct bf16", *OFFLOADED])
def test_offloaded_states_are_planned_in_the_host_s_memory(found, name):
    states = found[0][name]["states"]
    assert states.optimizer == 0
    planned = states.host + states.weights + states.gradients
    assert max(sum(rank[name]["held"]) for rank in found) == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("name", [*NAMES, *LORA, *OTHERS])
def test_a_checkpoint_has_the_bytes_that_were_planned(found, name):
    planned, files = found[0][name]["checkpoint"], found[0][name]["files"]
    exported = sum(size for file, size in files.items() if file.endswith(".safetensors"))
    assert exported == pytest.approx(planned.frozen + planned.trained, rel=0.01)
    for rank in range(2):
        own = sum(size for file, size in files.items() if f"_rank_{rank}_" in file and file.endswith(".pt"))
        own += files.get("mp_rank_00_model_states.pt", 0) if rank == 0 else 0
        # Beside a projector of a megabyte the files' own headers show: up to 15 KB a rank.
        assert own == pytest.approx(planned.ranks[rank], rel=0.01, abs=15_000)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "keep_best"),
    [(2, 0, False), (1, 0, True), (2, 30, False), (3, 20, True), (0, 0, False)],
)
def test_as_many_checkpoints_are_planned_as_retention_leaves_at_once(tmp_path, keep_last, keep_every, keep_best):
    config = CheckpointConfig(save_steps=10, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
    most = 0
    for step in (*range(10, 95, 10), 95):
        (tmp_path / name_of(step)).mkdir()
        if keep_best and step == 10:  # the first stays the best: one that the others do not keep anyway
            note_best(tmp_path, step, 1.0)
        most = max(most, len(existing(tmp_path)))
        remove_old(tmp_path, tmp_path / name_of(step), config)
    # One for good may be among the last too, and is then counted twice.
    assert most <= most_checkpoints(config, last_step=95) <= most + bool(keep_every)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.00 MiB"), (500e6, "476.84 MiB"), (2**30, "1.00 GiB"), (80e9, "74.51 GiB"), (2**41, "2,048.00 GiB")],
)
def test_bytes_are_shown_with_a_unit_that_is_also_read(count, text):
    assert format_bytes(count) == text
    if count:
        assert parse_bytes("--gpu-memory", text.replace(",", "").replace(" ", "")) == pytest.approx(count, rel=1e-4)
