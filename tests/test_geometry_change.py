"""A run that goes on with other ranks, micro-batches or ZeRO stages sees the same samples and takes the same steps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import ROOT
from ranks import run_ranks
from test_checkpoint import Planted, plant_bare, plant_in_tensors

from trainer.config import Config
from trainer.errors import CheckpointError

KEYS = ("fp32", "exp_avg", "exp_avg_sq")
STEPS = 8
LAST = "language_model.transformer.ln_f.weight"
"""A parameter of 32 elements, in the last group."""


def contents(engine) -> dict[str, torch.Tensor]:
    """Every tensor of an engine by name, asked of DeepSpeed one by one: weights, master weights, moments, steps."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() < 3:
        # DeepSpeed ties moments to parameters after the step of the first group, when the others have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[f"{name} weight"] = parameter.detach().cpu().clone()
        if parameter.requires_grad:
            found[f"{name} fp32"] = safe_get_full_fp32_param(parameter).detach().cpu().clone()
            for key in KEYS[1:]:
                found[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key).detach().cpu().clone()
    steps = [float(state["step"]) for state in engine.optimizer.optimizer.state.values()]
    found["steps"] = torch.tensor([min(steps), max(steps), engine.global_steps])
    return found


def leg(world, config_file: str, out: str, stage: str, changes: list[str], resume: str, until: int | None) -> None:
    """Trains up to a step, and leaves what the engine held before the first step and after the last."""
    from trainer.setup import setup
    from trainer.train import train

    settings = [
        f"run.output_dir={out}", f"deepspeed=ds_configs/{stage}.json", f"train.max_steps={STEPS}",
        "train.global_batch_size=6", "checkpoint.save_steps=100", "checkpoint.keep_last=0", "logging.sample_keys=true",
        "data.num_workers=0", *changes,
    ]  # fmt: skip
    state = setup(Config.load(config_file, settings, world.world_size), world, resume)
    if resume != "none":
        came = contents(state.engine)
        if world.is_main:
            torch.save(came, f"{out}/came-{state.step}.pt")
    train(state, until)
    left = contents(state.engine)
    if world.is_main:
        torch.save(left, f"{out}/left-{state.step}.pt")
    state.engine.destroy()


def straight_and_first_leg(world, config_file: str, out: str, stage: str, changes: list[str], until: int) -> None:
    leg(world, config_file, f"{out}/straight", stage, changes, "none", None)
    leg(world, config_file, f"{out}/chain", stage, changes, "none", until)


def legs(world, config_file: str, out: str, plan: list[tuple]) -> None:
    for stage, changes, until in plan:
        leg(world, config_file, f"{out}/chain", stage, changes, "auto", until)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_handed_over(out: Path, step: int) -> None:
    """What an engine began with is, bit for bit, what the one before it, of another geometry, ended with."""
    left, came = (torch.load(out / "chain" / f"{side}-{step}.pt") for side in ("left", "came"))
    assert left.keys() == came.keys()
    for name, tensor in left.items():
        assert tensor.dtype == came[name].dtype, name
        assert torch.equal(tensor, came[name]), name
    assert came["steps"].tolist() == [step] * 3
    # There was something to lose.
    moments = [tensor for name, tensor in came.items() if name.endswith(("exp_avg", "exp_avg_sq"))]
    assert moments
    assert sum(bool(tensor.any()) for tensor in moments) > 0.9 * len(moments)


def check_same_curve(out: Path) -> None:
    straight, chain = lines(out / "straight"), lines(out / "chain")
    assert [line["step"] for line in chain] == list(range(1, STEPS + 1))
    for expected, found in zip(straight, chain, strict=True):
        assert found["samples"] == expected["samples"]
        assert found["supervised_tokens"] == expected["supervised_tokens"]
        assert found["learning_rate"] == expected["learning_rate"]
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert len({line["loss"] for line in straight}) == STEPS
    end = torch.load(out / "straight" / f"left-{STEPS}.pt"), torch.load(out / "chain" / f"left-{STEPS}.pt")
    frozen = [name for name in end[0] if name.startswith("vision_tower.")]
    assert frozen
    for name in frozen:
        assert torch.equal(end[0][name], end[1][name]), name


MICRO = "train.micro_batch_size={}".format


@pytest.fixture(scope="module")
def chain(tiny_run, tmp_path_factory) -> Path:
    """Two ranks up to step 2, then one up to step 4, then two again; and beside it the run that was not stopped."""
    out = tmp_path_factory.mktemp("geometry")
    # Micro-batches x accumulation x ranks: 3 x 1 x 2, 1 x 6 x 1, 1 x 3 x 2.
    run_ranks(straight_and_first_leg, 2, str(tiny_run), str(out), "zero2", [MICRO(3)], 2)
    run_ranks(legs, 1, str(tiny_run), str(out), [("zero2", [MICRO(1)], 4)])
    run_ranks(legs, 2, str(tiny_run), str(out), [("zero2", [MICRO(1)], STEPS)])
    return out


def test_two_ranks_then_one_then_two_equal_the_run_that_was_not_stopped(chain, fault):
    check_handed_over(chain, 2)
    check_handed_over(chain, 4)
    check_same_curve(chain)
    written = [json.loads(file.read_text())["world_size"] for file in sorted(chain.glob("chain/*/state.json"))]
    assert written == [2, 1, 2]
    fault("2 ranks, then 1, then 2", "same batches, losses to 1e-5, frozen weights equal", equal="to rounding")


def in_small_groups(world, config_file: str, out: str, until: int | None, resume: str) -> None:
    """A leg under ZeRO-3 in the file's own sub-groups, or, from step 2 to 4, in some of 5,000 elements."""
    settings = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    settings["zero_optimization"]["sub_group_size"] = 5000
    file = Path(out, f"{world.rank}.json")
    file.write_text(json.dumps(settings))
    small = [f"deepspeed={file}"] if until == 4 else []
    leg(world, config_file, f"{out}/chain", "zero3", [MICRO(3), *small], resume, until)


def test_zero3_in_other_sub_groups_equals_the_run_of_one_size(tiny_run, tmp_path):
    run_ranks(straight_and_first_leg, 2, str(tiny_run), str(tmp_path), "zero3", [MICRO(3)], 2)
    run_ranks(in_small_groups, 2, str(tiny_run), str(tmp_path), 4, "auto")
    run_ranks(in_small_groups, 2, str(tiny_run), str(tmp_path), None, "auto")
    check_handed_over(tmp_path, 2)
    check_handed_over(tmp_path, 4)
    check_same_curve(tmp_path)


def test_stages_and_offload_in_turn_equal_the_run_of_one_stage(tiny_run, tmp_path, fault):
    run_ranks(straight_and_first_leg, 2, str(tiny_run), str(tmp_path), "zero2", [MICRO(3)], 2)
    plan = [("zero3", [MICRO(1)], 3), ("zero1", [MICRO(1)], 4), ("zero3_offload", [MICRO(3)], 5),
            ("zero2", [MICRO(3)], 6), ("zero1", [MICRO(3)], 7), ("zero3_offload", [MICRO(3)], STEPS)]  # fmt: skip
    run_ranks(legs, 2, str(tiny_run), str(tmp_path), plan)
    for step in range(2, 8):
        check_handed_over(tmp_path, step)
    check_same_curve(tmp_path)
    fault(
        "ZeRO-1, 2 and 3 in turn, with offload",
        "same batches, losses to 1e-5, frozen weights equal",
        equal="to rounding",
    )


def test_ranks_and_stage_change_at_once_in_bf16_where_no_size_comes_out_even(tiny_run, tmp_path):
    # Of a norm's 32 elements three ranks have 11, 11 and 10 and a filling under ZeRO-3, and under ZeRO-2 a group ends
    # with a filling too. In bf16 the losses drift apart, as rounding grows with every step; what is handed on does not.
    settings = ["train.bf16=true", MICRO(1)]
    (tmp_path / "chain").mkdir()
    first = (str(tmp_path / "chain"), "zero3", settings, "none", 2)
    run_ranks(leg, 3, str(tiny_run), *first)
    run_ranks(legs, 1, str(tiny_run), str(tmp_path), [("zero2", settings, 3)])
    plan = [("zero1", settings, 4), ("zero1", settings, 5), ("zero3", settings, 6)]
    run_ranks(legs, 3, str(tiny_run), str(tmp_path), plan)
    for step in range(2, 6):
        check_handed_over(tmp_path, step)
    came = torch.load(tmp_path / "chain" / "came-2.pt")
    assert {tensor.dtype for name, tensor in came.items() if name.endswith(" weight")} == {torch.bfloat16}
    # The master weights are more than the weights in hf/.
    assert any((tensor != tensor.bfloat16()).any() for name, tensor in came.items() if name.endswith(" fp32"))


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_a_run_goes_on_in_fp32_with_the_master_weights_of_its_bf16(tiny_run, tmp_path, stage):
    (tmp_path / "chain").mkdir()
    plan = [(stage, [MICRO(3), "train.bf16=false"], 4)]
    run_ranks(leg, 2, str(tiny_run), str(tmp_path / "chain"), stage, [MICRO(3), "train.bf16=true"], "none", 2)
    run_ranks(legs, 2, str(tiny_run), str(tmp_path), plan)
    left, came = (torch.load(tmp_path / "chain" / f"{side}-2.pt") for side in ("left", "came"))
    for name, tensor in left.items():
        assert torch.equal(came[name].to(tensor.dtype), tensor), name
        if name.endswith(" weight") and f"{name.removesuffix(' weight')} fp32" in came:
            assert torch.equal(came[name], came[f"{name.removesuffix(' weight')} fp32"]), name
    assert [line["step"] for line in lines(tmp_path / "chain")] == [1, 2, 3, 4]


@pytest.mark.long
def test_a_lora_run_changes_ranks_and_stage_with_its_adapter(tiny_run, tmp_path):
    settings = [MICRO(3), "lora={r: 3, dropout: 0.0}"]
    run_ranks(straight_and_first_leg, 2, str(tiny_run), str(tmp_path), "zero2", settings, 2)
    run_ranks(legs, 1, str(tiny_run), str(tmp_path), [("zero3", settings, 4), ("zero2", settings, STEPS)])
    for step in (2, 4):
        check_handed_over(tmp_path, step)
    came = torch.load(tmp_path / "chain" / "came-2.pt")
    moved = [name for name in came if ".lora_B." in name and name.endswith(" exp_avg")]
    # c_attn, w1 and w2 in two layers; and nothing of the language model's own is trained.
    assert len(moved) == 6
    assert all(came[name].any() for name in moved)
    assert not any(name.startswith("language_model.") and ".lora_" not in name for name in came if "exp_avg" in name)
    check_same_curve(tmp_path)


# --- Files that cannot be trusted ---


def edit(file: Path, change) -> None:
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def master(content: dict) -> torch.Tensor:
    return content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].detach()


def state(content: dict) -> dict:
    return content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]


RANK_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"
DAMAGE = {
    "missing": (RANK_1, Path.unlink, "expected one such file, found 0"),
    "torn": (RANK_1, lambda file: file.write_bytes(file.read_bytes()[:-100]), "nothing was loaded: not a whole file"),
    "cut": (RANK_1, lambda file: edit(file, lambda c: state(c).update(exp_avg=torch.zeros(8))), "exp_avg of "),
    "lacking": (RANK_1, lambda file: edit(file, lambda c: state(c).pop("exp_avg")), "exp_avg of "),
    "other step": (RANK_1, lambda file: edit(file, lambda c: state(c)["step"].add_(1)), "in their steps: [2.0, 3.0]"),
    "other layout": (RANK_1, lambda file: edit(file, lambda c: c.pop("optimizer_state_dict")), "KeyError"),
    "other rank": (RANK_1, lambda file: shutil.copy(file.parent / RANK_1.replace("1", "0", 1), file), "differs from"),
    "other weight": (RANK_1, lambda file: edit(file, lambda c: master(c)[5].add_(1e-6)), "differs from it in 1 ten"),
    "other parameters": (
        MODEL,
        lambda file: edit(file, lambda c: c["param_shapes"][-1].update(other=c["param_shapes"][-1].pop(LAST))),
        f"2 parameters differ: {LAST} is trained, and was not then; other was trained, and is not now",
    ),
    "other shape": (
        MODEL,
        lambda file: edit(file, lambda c: c["param_shapes"][-1].update({LAST: torch.Size((2, 16))})),
        f"{LAST} was of shape (2, 16), is (32,)",
    ),
}  # fmt: skip


def damaged(world, config_file: str, out: str) -> dict[str, str]:
    """What is said to an engine of one rank about checkpoints of two ranks with something wrong."""
    from trainer import checkpoint
    from trainer.setup import setup

    whole, sign = Path(out, "chain", "checkpoint-000002"), Path(out, "it-ran")
    settings = [f"run.output_dir={out}/other", "train.global_batch_size=6", MICRO(1), "data.num_workers=0"]
    engine = setup(Config.load(config_file, settings, world.world_size), world, str(whole)).engine
    cases = {name: (file, damage) for name, (file, damage, _) in DAMAGE.items()}
    for file in sorted((whole / "deepspeed").iterdir()):
        for plant in (plant_in_tensors, plant_bare):
            cases[f"{plant.__name__} {file.name}"] = (
                file.name,
                lambda file, plant=plant: plant(file, Planted(str(sign))),
            )
    said = {}
    for name, (file, damage) in cases.items():
        copy = Path(shutil.copytree(whole, Path(out, "damaged")))
        damage(copy / "deepspeed" / file)
        try:
            checkpoint.load(engine, copy)
            said[name] = "nothing"
        except CheckpointError as error:
            said[name] = str(error)
        assert not sign.exists(), name
        shutil.rmtree(copy)
    checkpoint.load(engine, whole)
    engine.destroy()
    return said


@pytest.fixture(scope="module")
def said(tiny_run, chain) -> dict[str, str]:
    return run_ranks(damaged, 1, str(tiny_run), str(chain))[0]


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file_is_refused_by_name(said, chain, name):
    file, _, expected = DAMAGE[name]
    assert expected in said[name]
    assert f"{chain}/damaged" in said[name]
    if not expected.startswith(("differs", "in their", "2 parameters", LAST)):
        assert f"{chain}/damaged/deepspeed/{file}" in said[name].replace("*", "")


def test_planted_pickle_is_refused_and_not_run(said):
    planted = {name: text for name, text in said.items() if name.startswith("plant")}
    assert len(planted) == 6  # three files, two ways
    for name, text in planted.items():
        assert name.split()[1] in text
        assert "nothing was loaded" in text
        assert "weights_only" not in text  # no advice to load it all the same
