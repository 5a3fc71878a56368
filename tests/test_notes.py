"""What the notes' own code saved, merged onto its folders: against the sums done by hand."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from ranks import script
from safetensors.torch import load_file

from trainer.errors import CheckpointError
from trainer.load import load_trained
from trainer.models.modeling_qwen import QWenLMHeadModel
from trainer.notes import import_notes

R, ALPHA = 4, 32
"""The notes' alpha is 32, whatever the rank."""


@pytest.fixture
def notes(tiny_run, tmp_path) -> Path:
    """Written as the notes' `save_model` does, with weights that are as after training: B is not zero."""
    folder = tmp_path / "notes"
    folder.mkdir()
    torch.manual_seed(3)
    settings = LoraConfig(task_type="CAUSAL_LM", r=R, lora_alpha=ALPHA, target_modules=["c_attn", "w1", "w2"])
    model = get_peft_model(QWenLMHeadModel.from_pretrained(tiny_run.parent / "tiny-qwen"), settings)
    adapter = {name: torch.randn(weight.shape) for name, weight in get_peft_model_state_dict(model).items()}
    assert len(adapter) == 2 * 2 * 3  # A and B of three layers in each of two blocks
    torch.save(adapter, folder / "adapter_model.bin")
    projector = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    torch.save(projector.state_dict(), folder / "other_params.bin")
    model.peft_config["default"].save_pretrained(folder, auto_mapping_dict=None)
    return folder


@pytest.fixture
def run(tiny_run, notes, tmp_path):
    """Imports the notes' folder, from the tiny Qwen and CLIP."""
    models = tiny_run.parent / "tiny-qwen", tiny_run.parent / "tiny-clip"
    return lambda: import_notes(*models, notes, tmp_path / "out")


def test_weights_are_the_base_and_the_products_of_the_adapter(tiny_run, notes, tmp_path):
    done = script(
        "launch/import_notes.py", "--language-model", str(tiny_run.parent / "tiny-qwen"), "--vision-tower",
        str(tiny_run.parent / "tiny-clip"), "--notes", str(notes), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = load_trained(tmp_path / "out")
    base = load_file(tiny_run.parent / "tiny-qwen" / "model.safetensors")
    adapter = torch.load(notes / "adapter_model.bin", weights_only=True)
    found = model.language_model.state_dict()
    assert found.keys() == base.keys()
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            weight = weight + ALPHA / R * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            assert torch.allclose(found[name], weight, rtol=0, atol=1e-5)
            assert not torch.equal(found[name], base[name])
        else:
            assert torch.equal(found[name], weight)
    # Linear - GELU - Linear, on what CLIP's last layer says of the patches.
    projector = torch.load(notes / "other_params.bin", weights_only=True)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        patches = model.vision_tower(pixels).last_hidden_state[:, 1:]
        hidden = torch.nn.functional.gelu(patches @ projector["0.weight"].T + projector["0.bias"])
        expected = hidden @ projector["2.weight"].T + projector["2.bias"]
        assert torch.allclose(model.get_image_features(pixels), expected, atol=1e-4)
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert model.config.image_token_id == ids["<|extra_0|>"]
    assert model.generation_config.eos_token_id == [ids["<|im_end|>"], ids["<|endoftext|>"]]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def malicious_adapter(notes: Path) -> str:
    torch.save({"a": Malicious()}, notes / "adapter_model.bin")
    return "adapter_model.bin: nothing was loaded: it holds posix.system, expected tensors alone"


def malicious_projector(notes: Path) -> str:
    torch.save(Malicious(), notes / "other_params.bin")
    return "other_params.bin: nothing was loaded: it holds posix.system"


def truncated_adapter(notes: Path) -> str:
    file = notes / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[:500])
    return "adapter_model.bin: cannot be read"


def missing_projector(notes: Path) -> str:
    (notes / "other_params.bin").unlink()
    return "no other_params.bin; the notes' code writes them side by side"


def projector_of_another_tower(notes: Path) -> str:
    weights = torch.load(notes / "other_params.bin", weights_only=True)
    torch.save({**weights, "0.weight": torch.zeros(32, 25)}, notes / "other_params.bin")
    return "'0.weight': (32, 25)"


def adapter_of_another_model(notes: Path) -> str:
    weights = torch.load(notes / "adapter_model.bin", weights_only=True)
    name = "base_model.model.transformer.h.1.mlp.w1.lora_A.weight"
    torch.save({**weights, name: torch.zeros(R, 33)}, notes / "adapter_model.bin")
    return "adapter_model.bin: does not fit the language model"


def adapter_of_a_deeper_model(notes: Path) -> str:
    weights = torch.load(notes / "adapter_model.bin", weights_only=True)
    name = "base_model.model.transformer.h.9.mlp.w1.lora_A.weight"
    torch.save({**weights, name: torch.zeros(R, 32)}, notes / "adapter_model.bin")
    return "transformer.h.9.mlp.w1.lora_A"


def adapter_with_a_gap(notes: Path) -> str:
    weights = torch.load(notes / "adapter_model.bin", weights_only=True)
    del weights["base_model.model.transformer.h.1.mlp.w1.lora_B.weight"]
    torch.save(weights, notes / "adapter_model.bin")
    return "transformer.h.1.mlp.w1.lora_B.default.weight is missing"


def another_kind_of_adapter(notes: Path) -> str:
    (notes / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    return "an adapter of type 'IA3', expected 'LORA'"


@pytest.mark.parametrize(
    "damage",
    [malicious_adapter, malicious_projector, truncated_adapter, missing_projector, projector_of_another_tower,
     adapter_of_another_model, adapter_of_a_deeper_model, adapter_with_a_gap, another_kind_of_adapter],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_written(run, notes, tmp_path, monkeypatch, damage):
    said = damage(notes)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        run()
    assert str(raised.value).startswith(str(notes))
    assert said in str(raised.value)
    assert not (tmp_path / "owned").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes"]


def test_pickled_weights_of_a_folder_are_read_and_code_in_them_is_not(tiny_run, tmp_path):
    from trainer.folders import language_config, read_model

    folder = tmp_path / "old"  # as releases before safetensors are
    folder.mkdir()
    shutil.copy(tiny_run.parent / "tiny-qwen" / "config.json", folder)
    weights = load_file(tiny_run.parent / "tiny-qwen" / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    read = read_model(language_config(folder), folder, torch.float32).state_dict()
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())
    torch.save({**weights, "lm_head.weight": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"{folder}: nothing was loaded: it holds posix.system"):
        read_model(language_config(folder), folder, torch.float32)
