"""Folders of models that cannot be right are refused by name, before anything trains. (Exports: test_handover.py)"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from newer import write_language_model, write_tower
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPModel, SiglipModel

from trainer.config import Config
from trainer.errors import UserError
from trainer.load import load_model
from trainer.models.modeling_qwen import QWenLMHeadModel
from trainer.tokenizer import load_tokenizer


def truncate(folder: Path) -> str:
    file = sorted(folder.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-8])
    return f"{file}: cannot be read"


def remove_a_shard(folder: Path) -> str:
    file = sorted(folder.glob("model-*.safetensors"))[1]
    file.unlink()
    return f"{file}: cannot be read"


def resize_a_weight(folder: Path) -> str:
    file, name = weight_in(folder)
    weights = load_file(file)
    weights[name] = torch.zeros(3, 5)
    save_file(weights, file, {"format": "pt"})
    name = name.removeprefix("vision_model.")
    return f"1 weights have other shapes than its config.json says, among them {name} is (3, 5), expected "


def drop_a_weight(folder: Path) -> str:
    file, name = weight_in(folder)
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    return "1 weights are missing"


def weight_in(folder: Path) -> tuple[Path, str]:
    """A matrix of the second layer, and its file."""
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(n for n in sorted(names) if re.search(r"\.1\.mlp\.(w1|up_proj|fc1)\.weight", n))  # of no text tower
    return folder / names[name], name


def spoil_the_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{}")
    return "model.safetensors.index.json: cannot be read"


def spoil_the_configuration(folder: Path) -> str:
    (folder / "config.json").write_text("not JSON")
    return "config.json"


def no_weights(folder: Path) -> str:
    for file in folder.glob("model*"):
        file.unlink()
    return f"{folder}: cannot be loaded"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tiny_run) -> Path:
    """Folders of each kind, in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    for kind in ("qwen2", "qwen3"):
        write_language_model(folder / kind, kind)
    for kind in ("clip", "siglip"):
        write_tower(folder / kind, kind)
    shutil.copytree(tiny_run.parent / "tiny-qwen", folder / "qwen")
    classes = {"qwen": QWenLMHeadModel, "qwen2": AutoModelForCausalLM, "qwen3": AutoModelForCausalLM,
               "clip": CLIPModel, "siglip": SiglipModel}  # fmt: skip
    for kind, cls in classes.items():
        model = cls.from_pretrained(folder / kind)
        (folder / kind / "model.safetensors").unlink()
        model.save_pretrained(folder / kind, max_shard_size="20KB")
        assert len(list((folder / kind).glob("model-*.safetensors"))) > 2
    return folder


def refusal(tiny_run: Path, *settings: str) -> str | None:
    """What is said of a model that cannot be read."""
    try:
        config = Config.load(tiny_run, list(settings))
        load_model(config, load_tokenizer(config.model))
    except UserError as error:
        return str(error)
    return None


DAMAGES = [
    truncate, remove_a_shard, resize_a_weight, drop_a_weight, spoil_the_index, spoil_the_configuration, no_weights
]  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen", "qwen2", "qwen3", "clip", "siglip"])
def test_bad_folders_are_refused_by_name(tiny_run, sharded, tmp_path, kind):
    key = "vision_tower" if kind in ("clip", "siglip") else "language_model"
    assert refusal(tiny_run, f"model.{key}={sharded / kind}") is None  # in several files, and whole
    for damage in DAMAGES:
        folder = Path(shutil.copytree(sharded / kind, tmp_path / damage.__name__ / kind))
        said = damage(folder)
        found = refusal(tiny_run, f"model.{key}={folder}")
        assert found, f"{damage.__name__} was not noticed"
        assert str(folder) in found
        assert said in found, f"{damage.__name__}: {found}"


@pytest.mark.parametrize(
    ("kind", "key"), [("clip", "language_model"), ("qwen3", "vision_tower"), ("qwen", "init_from")]
)
def test_folders_of_another_architecture_are_refused_by_name(tiny_run, sharded, kind, key):
    others = ["model.language_model=null", "model.vision_tower=null"] if key == "init_from" else []
    found = refusal(tiny_run, *others, f"model.{key}={sharded / kind}")
    assert f"{sharded / kind}" in found
    assert f"of architecture '{kind}'" in found


def test_a_tokenizer_of_another_model_is_refused(tiny_run, sharded):
    folders = f"model.language_model={sharded / 'qwen2'}", f"model.tokenizer={sharded / 'qwen'}"
    assert "is smaller than the tokenizer's" in refusal(tiny_run, *folders)
