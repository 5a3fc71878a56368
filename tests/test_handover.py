"""Stage 2 begins with what stage 1 exported: what differs is named, before anything is trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, script
from safetensors.torch import load_file, save_file

from trainer.config import Config
from trainer.errors import CheckpointError, ConfigError


def first_stage(world, config_file: str, out: str) -> None:
    from trainer.setup import setup
    from trainer.train import train

    settings = [f"run.output_dir={out}", "train.max_steps=1", "data.num_workers=0"]
    state = setup(Config.load(config_file, settings, world.world_size), world, "none")
    train(state)
    state.engine.destroy()


@pytest.fixture(scope="module")
def stage1(tiny_run, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("handover") / "stage1"
    run_ranks(first_stage, 1, str(tiny_run), str(run))
    return run


@pytest.fixture
def second_stage(tiny_run, stage1, tmp_path):
    """A copy of stage 1's run folder, and what stage 2 says of it; None if it can begin."""
    copy = Path(shutil.copytree(stage1, tmp_path / "stage1"))

    def start(*settings: str) -> str | None:
        from trainer.load import check_handover, load_model
        from trainer.tokenizer import load_tokenizer

        config = Config.load(
            tiny_run, [f"model.init_from={copy}", "model.language_model=null", "model.vision_tower=null", *settings]
        )
        try:
            check_handover(config.model)
            load_model(config, load_tokenizer(config.model))
        except (CheckpointError, ConfigError) as error:
            return str(error)
        return None

    return copy, copy / "checkpoint-000001" / "hf", start


def test_what_is_as_it_was_written_is_taken(second_stage, caplog):
    run, hf, start = second_stage
    assert start() is None
    assert start("model.tokenizer=" + str(hf)) is None
    caplog.set_level("INFO", "trainer")
    shutil.copytree(hf, run.parent / "elsewhere")
    assert start(f"model.init_from={run.parent / 'elsewhere'}") is None
    assert "not compared" in caplog.text


def test_a_changed_byte_is_named(second_stage):
    _, hf, start = second_stage
    file = hf / "model-trained.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert "not whole: hf/model-trained.safetensors has other bytes than were written" in start()


def change_projector(hf: Path) -> str:
    weights = load_file(hf / "model-trained.safetensors")
    weights["multi_modal_projector.linear_1.weight"] = torch.zeros(32, 25)
    save_file(weights, hf / "model-trained.safetensors", {"format": "pt"})
    return "multi_modal_projector.linear_1.weight is (32, 25), expected (32, 24)"


def cut_weights(hf: Path) -> str:
    file = hf / "model-frozen.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return f"{file}: cannot be read"


def remove_a_file(hf: Path) -> str:
    (hf / "model-trained.safetensors").unlink()
    return f"{hf}/model-trained.safetensors: cannot be read"


def drop_a_weight(hf: Path) -> str:
    weights = load_file(hf / "model-trained.safetensors")
    del weights["multi_modal_projector.linear_2.bias"]
    save_file(weights, hf / "model-trained.safetensors", {"format": "pt"})
    return "1 weights are missing, among them multi_modal_projector.linear_2.bias"


def change_architecture(hf: Path) -> str:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    return "of architecture 'llava', expected an export ('mqwen_vl')"


@pytest.mark.parametrize("damage", [change_projector, cut_weights, remove_a_file, drop_a_weight, change_architecture])
def test_an_export_of_another_shape_is_named(second_stage, damage):
    run, hf, start = second_stage
    said = damage(hf)
    (hf.parent / "manifest.json").unlink()  # as of a folder that was put together by hand
    assert said in start()


def test_settings_that_differ_are_named(second_stage, tiny_run, tmp_path):
    _, hf, start = second_stage
    said = start("model.vision_feature_layer=-2", "model.image_aspect=pad")
    assert "model.vision_feature_layer is -2, but" in said
    assert "was trained with -1" in said
    assert "model.image_aspect is 'pad'" in said
    # Another vocabulary: two words have changed places.
    other = tmp_path / "other"
    shutil.copytree(tiny_run.parent / "tiny-qwen", other)
    lines = (other / "qwen.tiktoken").read_text().splitlines()
    words = [line.split() for line in lines]
    words[-1][0], words[-2][0] = words[-2][0], words[-1][0]
    (other / "qwen.tiktoken").write_text("\n".join(" ".join(pair) for pair in words) + "\n")
    assert "2 tokens have other ids than in" in start(f"model.tokenizer={other}")


def test_the_command_says_it_and_leaves_with_2(second_stage, tiny_run, tmp_path):
    run, hf, _ = second_stage
    (hf / "tokenizer.json").write_text("{}")
    done = script(
        "launch/train.py", "--config", str(tiny_run), "--set", f"model.init_from={run}",
        "model.language_model=null", "model.vision_tower=null", f"run.output_dir={tmp_path}/stage2",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "not whole: hf/tokenizer.json should have" in done.stderr
    assert "Traceback" not in done.stderr
