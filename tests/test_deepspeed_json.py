"""DeepSpeed's JSON: what "auto" becomes, and what is refused that DeepSpeed would accept in silence."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from trainer.config import Config, OptimConfig, TrainConfig
from trainer.deepspeed_json import ALLOWED, build
from trainer.dist import World
from trainer.engine import deepspeed_settings
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "ds_configs").glob("*.json"))

# 48 samples a step, 4 at a time, on 3 ranks: 48 / (4 x 3) = 4 steps of accumulation.
CONFIG = Config(
    train=TrainConfig(global_batch_size=48, micro_batch_size=4, bf16=True), optim=OptimConfig(max_grad_norm=0.5)
)


ZERO_2 = {"zero_optimization": {"stage": 2}}


@pytest.fixture
def built(tmp_path):
    """Builds from a JSON object (of ZeRO-2, unless it says otherwise), or from text: (what the engine gets, mistakes
    with the file's name left out)."""

    def build_from(content, config: Config = CONFIG, world_size: int = 3) -> tuple[dict, list[str]]:
        file = tmp_path / "zero.json"
        file.write_text(content if isinstance(content, str) else json.dumps({**ZERO_2, **content}))
        settings, errors = build(file, config, world_size)
        assert all(error.startswith(f"deepspeed: {file}") for error in errors)
        return settings, [error.removeprefix(f"deepspeed: {file}").lstrip(": ") for error in errors]

    return build_from


OWNED = {
    "train_batch_size": 48, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5, "bf16": {"enabled": True},
}  # fmt: skip
AUTO = {**dict.fromkeys(OWNED, "auto"), "bf16": {"enabled": "auto"}}


@pytest.mark.parametrize("given", [AUTO, {}, OWNED, {"bf16": "auto"}], ids=["auto", "absent", "equal", "bf16 auto"])
def test_yaml_fills_what_it_owns(built, given):
    settings, errors = built({**given, "zero_optimization": {"stage": 2}})
    assert errors == []
    assert {key: settings[key] for key in OWNED} == OWNED
    assert settings["zero_optimization"] == {"stage": 2}


def test_file_keeps_what_it_owns(built):
    settings, errors = built(
        {"bf16": {"enabled": "auto", "check_grad_overflow": True}, "wall_clock_breakdown": True, "steps_per_print": 7,
         "data_types": {"grad_accum_dtype": "bf16"}}
    )  # fmt: skip
    assert errors == []
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert (settings["wall_clock_breakdown"], settings["steps_per_print"]) == (True, 7)
    assert settings["data_types"] == {"grad_accum_dtype": "bf16"}


def test_gradients_are_summed_in_fp32_unless_the_file_says_otherwise(built):
    assert built({})[0]["data_types"] == {"grad_accum_dtype": "fp32"}


def test_contradictions_are_named_with_both_values(built):
    given = {"train_batch_size": 64, "gradient_clipping": 1.0, "bf16": {"enabled": False},
             "gradient_accumulation_steps": 4}  # fmt: skip
    _, errors = built(given)
    # The accumulation of 4 is what the YAML makes it: no contradiction.
    assert errors == [
        'train_batch_size is 64, but the YAML makes it 48; write "auto" there',
        'gradient_clipping is 1.0, but the YAML makes it 0.5; write "auto" there',
        'bf16.enabled is False, but the YAML makes it True; write "auto" there',
    ]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("gradient_cliping", "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?"),
        ("zero_optimisation", "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"),
        ("qwertz", "unknown key 'qwertz'"),
        # DeepSpeed 0.19.8 has removed it and stops, but only once the engine is built.
        ("sparse_gradients", "unknown key 'sparse_gradients'"),
    ],
)
def test_unknown_key_names_the_nearest(built, key, said):
    (error,) = built({key: True})[1]
    assert error.startswith(said)


@pytest.mark.parametrize(
    ("key", "home"),
    [("optimizer", "optim"), ("scheduler", "optim"), ("fp16", "train.bf16"), ("amp", "train.bf16"),
     ("activation_checkpointing", "model.activation_checkpointing"), ("tensorboard", "curves")],
)  # fmt: skip
def test_keys_of_the_yaml_are_refused_with_their_home(built, key, home):
    (error,) = built({key: {}})[1]
    assert error.startswith(f"'{key}' does not belong here")
    assert home in error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zero_optimization": {}}, "zero_optimization.stage is 0, expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0, expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage is 5, expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage is '2', expected 1, 2 or 3"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow is false"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm is false"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.device is nvme, which only ZeRO-3 knows",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device is nvme"),
    ],
)
def test_what_the_trainer_cannot_work_with_is_refused(built, given, said):
    (error,) = built(given)[1]
    assert said in error


def test_all_mistakes_come_at_once(built):
    _, errors = built({"optimizer": {}, "gradient_cliping": 1, "train_batch_size": 1})
    assert len(errors) == 3


@pytest.mark.parametrize(
    ("text", "said"), [('{"bf16": ', "is not readable JSON"), ("[1]", "expected an object, found a list")]
)
def test_file_that_is_no_object_of_json(built, text, said):
    settings, (error,) = built(text)
    assert settings == {}
    assert said in error


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_deepspeed_reads_the_files_of_the_repository_as_meant(file, bf16):
    # Independently: DeepSpeed's own reader, which on one process takes 48 / 4 = 12 steps of accumulation.
    config = Config(train=TrainConfig(global_batch_size=48, micro_batch_size=4, bf16=bf16), optim=CONFIG.optim)
    settings, errors = build(file, config, world_size=1)
    assert errors == []
    assert set(settings) <= ALLOWED
    read = DeepSpeedConfig(settings)
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (48, 4, 12)
    assert (read.bfloat16_config.enabled, read.gradient_clipping) == (bf16, 0.5)
    assert read.zero_config.stage == int(file.stem[4])
    assert read.zero_config.reduce_bucket_size == 200_000_000
    assert read.grad_accum_dtype == "fp32"
    assert (read.zero_config.offload_optimizer is not None) == (file.stem == "zero3_offload")


def test_mistakes_of_the_zero_section_come_at_once_each_on_a_line(tiny_run, tmp_path):
    zero = {"stage": 2, "reduce_bucket_sise": 1, "overlap_comm": "perhaps", "offload_optimizer": {"device": "gpu"}}
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8-sig")
    config = Config.load(tiny_run, [f"deepspeed={tmp_path}/mine.json"])
    with pytest.raises(ConfigError) as raised:
        deepspeed_settings(config, World())
    start = f"deepspeed: {tmp_path}/mine.json: zero_optimization."
    assert sorted(str(raised.value).splitlines()) == [
        f"{start}offload_optimizer.device: Input should be 'none', 'cpu' or 'nvme', found 'gpu'",
        f"{start}overlap_comm: Input should be a valid boolean, unable to interpret input, found 'perhaps'",
        f"{start}reduce_bucket_sise: unknown key; did you mean 'reduce_bucket_size'?",
    ]
