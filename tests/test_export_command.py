"""`launch/export.py`: what leaves a run is whole, shares nothing with it, and says what the model says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import OTHER_CONFIG
from ranks import script
from reference import shared
from safetensors.torch import load_file
from transformers import CLIPVisionModel

from trainer import export, lora
from trainer.card import OPEN, OPEN_ADAPTER
from trainer.config import Config
from trainer.errors import CheckpointError, ConfigError
from trainer.load import image_transform, load_model, load_trained, trained_system_prompt
from trainer.models.modeling_mqwen import MQWenLMHeadModel
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration, MultiModalProjector
from trainer.models.modeling_qwen import QWenLMHeadModel
from trainer.models.tokenization_qwen import build_tokenizer
from trainer.parts import weights_hash, write_language_model
from trainer.publish import publish
from trainer.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def checkpoints(tiny_run, tmp_path_factory) -> Path:
    """`plain/hf` and `lora/{base,hf}`, as checkpoints have them, with an adapter whose B is not zero."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, settings in (("plain", []), ("lora", ["lora={r: 4}"])):
        config = Config.load(tiny_run, settings)
        tokenizer = load_tokenizer(config.model)
        model = load_model(config, tokenizer)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        own, adapter = lora.split({name: p.detach().clone() for name, p in model.named_parameters()})
        frozen = {name: own.pop(name) for name in list(own) if not name.startswith("multi_modal_projector")}
        (folder / name).mkdir()
        export.describe(model)
        base = folder / name / (lora.BASE if adapter else "hf")
        processor = export.make_processor(model, tokenizer, image_transform(model.config), "Look.")
        export.write(model, own, frozen, base, processor, f"A card\n{OPEN_ADAPTER}", 0o644)
        if adapter:
            lora.write_adapter(model, adapter, base, folder / name / "hf", tokenizer, f"A card\n{OPEN_ADAPTER}", 0o644)
    return folder


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    input_ids = torch.randint(0, 400, (2, 12))
    input_ids[:, 2:6] = 0  # set to the placeholder below, where the model is known
    return {"input_ids": input_ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {**inputs, "input_ids": inputs["input_ids"].clone()}
    inputs["input_ids"][:, 2:6] = model.config.image_token_id
    with torch.no_grad():
        return model.eval()(**inputs).logits


def with_adapter(checkpoint: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """By PEFT, unmerged."""
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(load_trained(checkpoint / "base"), checkpoint / "hf"), inputs)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_plain_export_is_copied_byte_for_byte_and_shares_no_file(checkpoints, tmp_path):
    publish(checkpoints / "plain", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(checkpoints / "plain" / "hf")
    for file in (tmp_path / "out").iterdir():
        assert file.stat().st_nlink == 1
        assert not file.is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lora_run_gives_base_and_adapter_that_find_each_other(checkpoints, inputs, tmp_path):
    publish(checkpoints / "lora", tmp_path / "out")
    found, expected = tree(tmp_path / "out"), tree(checkpoints / "lora")
    assert found.keys() == expected.keys()
    differing = [name for name in found if found[name] != expected[name]]
    assert differing == ["hf/adapter_config.json"]
    named = json.loads(found["hf/adapter_config.json"])["base_model_name_or_path"]
    assert named == str((tmp_path / "out" / "base").resolve())
    # And every command takes the folder as it takes a checkpoint.
    there = with_adapter(checkpoints / "lora", inputs)
    assert (logits(load_trained(tmp_path / "out"), inputs) - there).abs().max() < 1e-5


def test_merged_logits_are_those_of_the_adapter(checkpoints, inputs, tmp_path):
    done = script("launch/export.py", "--model", str(checkpoints / "lora"), "--out", str(tmp_path / "out"), "--merge")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/out: ")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    merged, there = load_trained(tmp_path / "out"), with_adapter(checkpoints / "lora", inputs)
    assert (logits(merged, inputs) - there).abs().max() < 1e-5
    assert (logits(load_trained(checkpoints / "lora" / "base"), inputs) - there).abs().max() > 1e-2
    assert merged.config.auto_map
    assert {p.name for p in (tmp_path / "out").glob("*.py")} == {
        p.name for p in (checkpoints / "lora" / "base").glob("*.py")
    }
    # The card says how it is opened now, and the system prompt has come along.
    assert (tmp_path / "out" / "README.md").read_text() == f"A card\n{OPEN}"
    assert trained_system_prompt(tmp_path / "out") == "Look."


def test_another_type_is_another_type_of_the_same_weights(checkpoints, tmp_path):
    publish(checkpoints / "plain", tmp_path / "out", dtype=torch.bfloat16)
    before, after = load_trained(checkpoints / "plain"), load_trained(tmp_path / "out")
    assert (before.dtype, after.dtype) == (torch.float32, torch.bfloat16)
    for name, weight in before.state_dict().items():
        assert torch.equal(weight.bfloat16(), after.state_dict()[name]), name


@pytest.mark.parametrize("run", ["plain", "lora"])
def test_the_language_model_is_a_plain_qwen_folder(checkpoints, tiny_run, inputs, tmp_path, run):
    publish(checkpoints / run, tmp_path / "out", part="language_model")
    whole, model = load_trained(checkpoints / run), QWenLMHeadModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(
            model(inputs["input_ids"]).logits, whole.eval().language_model(inputs["input_ids"]).logits
        )  # fmt: skip
    original = tiny_run.parent / "tiny-qwen"
    names, found = (
        {name: weight.shape for name, weight in load_file(folder / "model.safetensors").items()}
        for folder in (original, tmp_path / "out")
    )
    assert found == names
    # It names no processor: that of the whole model is not there.
    assert "processor_class" in json.loads((checkpoints / run / "hf" / "tokenizer_config.json").read_text())
    assert "processor_class" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    # Its own vocabulary, token for token, in the official file, and so a folder to train from.
    assert (tmp_path / "out" / "qwen.tiktoken").read_text() == (original / "qwen.tiktoken").read_text()
    config = Config.load(tiny_run, [f"model.language_model={tmp_path / 'out'}"])
    again = load_model(config, load_tokenizer(config.model)).language_model.state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


def test_the_original_comes_out_as_it_went_in(tiny_run, tmp_path):
    golden = shared("golden/config.json").parent
    language_model = MQWenLMHeadModel.from_pretrained(golden, OTHER_CONFIG)
    tower = CLIPVisionModel.from_pretrained(tiny_run.parent / "tiny-clip")
    model = MQWenForConditionalGeneration.from_parts(tower, language_model, image_token_id=300)
    write_language_model(model, build_tokenizer(tiny_run.parent / "tiny-qwen" / "qwen.tiktoken"), tmp_path)
    original, found = (json.loads((folder / "config.json").read_text()) for folder in (golden, tmp_path))
    assert found.pop("transformers_version") != original.pop("transformers_version")  # the library that wrote it
    assert {key: found[key] for key in original} == original
    assert found.keys() - original.keys() == {"bos_token_id", "eos_token_id", "pad_token_id", "dtype"}
    before, after = (load_file(folder / "model.safetensors") for folder in (golden, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_the_projector_comes_with_what_it_stands_between(checkpoints, tiny_run, tmp_path):
    publish(checkpoints / "lora", tmp_path / "out", part="projector")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"projector.json", "projector.safetensors"}
    whole = load_trained(checkpoints / "lora")
    projector = MultiModalProjector(24, 32)
    projector.load_state_dict(load_file(tmp_path / "out" / "projector.safetensors"))
    for name, weight in projector.state_dict().items():
        assert torch.equal(weight, whole.multi_modal_projector.state_dict()[name]), name
    found = json.loads((tmp_path / "out" / "projector.json").read_text())
    tower = found["vision_tower"]
    assert (tower["image_size"], tower["patch_size"], tower["hidden_size"]) == (16, 8, 24)
    assert (found["vision_feature_layer"], found["image_aspect"], found["hidden_size"]) == (-1, "crop", 32)
    assert tower["sha256"] == weights_hash(whole.vision_tower)
    with torch.no_grad():
        next(whole.vision_tower.parameters()).view(-1)[0] += 1
    assert tower["sha256"] != weights_hash(whole.vision_tower)


@pytest.mark.parametrize(
    ("run", "options"),
    [
        ("plain", {}), ("lora", {}), ("lora", {"merge": True}), ("plain", {"dtype": torch.bfloat16}),
        ("lora", {"part": "language_model"}), ("plain", {"part": "projector"}),
    ],
)  # fmt: skip
def test_every_file_has_the_mode_that_files_have_here(checkpoints, tmp_path, run, options):
    (tmp_path / "usual").touch()
    publish(checkpoints / run, tmp_path / "out", **options)
    modes = {file.name: oct(file.stat().st_mode) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert modes == dict.fromkeys(modes, oct((tmp_path / "usual").stat().st_mode))


def test_what_cannot_be_meant_is_said_and_nothing_is_written(checkpoints, tmp_path):
    plain, with_lora, out = checkpoints / "plain", checkpoints / "lora", tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for error, said, *arguments in [
        (ConfigError, "has no LoRA adapter: the model is whole", plain, out, True),
        (ConfigError, "give --merge too", with_lora, out, False, None, torch.bfloat16),
        (ConfigError, "is there already, and not empty", plain, tmp_path / "full"),
        (ConfigError, "is there already, and not empty", plain, tmp_path / "file"),
        (CheckpointError, "neither a model folder", tmp_path / "full", out),
        (CheckpointError, "of architecture 'qwen', expected an export", qwen_folder(tmp_path), out),
    ]:
        with pytest.raises(error, match=said):
            publish(*arguments)
    assert tree(tmp_path / "full") == {"mine": b"mine"}
    assert not out.exists()


def qwen_folder(folder: Path) -> Path:
    (folder / "qwen").mkdir()
    (folder / "qwen" / "config.json").write_text('{"model_type": "qwen"}')
    return folder / "qwen"


def test_a_changed_byte_does_not_leave_and_an_empty_folder_is_filled(checkpoints, tmp_path):
    from trainer import manifest

    copy = Path(shutil.copytree(checkpoints / "lora", tmp_path / "copy"))
    entries = {
        name: (len(content), manifest.file_hash(copy / name)) for name, content in tree(copy).items()
    }  # fmt: skip
    manifest.write(copy, entries)
    (tmp_path / "out").mkdir()
    publish(copy, tmp_path / "out")
    assert (tmp_path / "out" / "base" / "config.json").is_file()
    file = copy / "base" / "model-frozen.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="base/model-frozen.safetensors has other bytes than were written"):
        publish(copy, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_failure_half_way_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match=r"out: cannot be written \(No space left on device\)"):
        publish(checkpoints / "plain", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
