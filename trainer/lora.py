"""LoRA through PEFT: adapters beside linear layers of the language model, in a model and in folders.

    add_adapter(model, config, seed)      into a model in place; the language model's own weights are frozen by that
    split(weights) -> own, adapter        weights under the names that stand in files
    write_adapter(...)  merge(...)        the PEFT folder, and the way back into plain weights

A checkpoint of a LoRA run holds the complete model without its adapter in base/, and the adapter in hf/. (LoRA: Hu et
al. 2021)
"""

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config import LoraConfig
from trainer.errors import CheckpointError, ConfigError

BASE = "base"
"""Folder in a LoRA run's checkpoint that has the complete model, its adapter left out."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""PEFT's own names."""

ADAPTER = "default"
"""What PEFT calls the only adapter of a model; in a parameter's name, but not in files."""

PREFIX = "base_model.model."
"""What PEFT puts before the names in files."""


def add_adapter(model: Any, config: LoraConfig, seed: int) -> None:
    """Puts an adapter beside every linear layer of `model.language_model` that `config.target_modules` names.

    The language model's own parameters stop training; others are as they were. B starts at zero, and A from a
    generator of its own, so that a seed gives the same weights whatever ran before, at every ZeRO stage; both in the
    layer's dtype. Raises ConfigError where a name is of no such layer.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    targets = "|".join(map(re.escape, _targets(model, config.target_modules)))
    settings = PeftLoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, task_type="CAUSAL_LM",
        target_modules=rf"language_model\.(.+\.)?({targets})",
    )  # fmt: skip
    inject_adapter_in_model(settings, model, ADAPTER)
    for name, parameter in model.named_parameters():
        own_of_language_model = name.startswith("language_model.") and not is_adapter(name)
        parameter.requires_grad_(is_adapter(name) or (name in trained and not own_of_language_model))
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            _reset(layer, generator)


@torch.no_grad()
def _reset(layer: Any, generator: torch.Generator) -> None:
    """PEFT's own distribution: A uniform within 1/sqrt(inputs), B zero."""
    a, b, dtype = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.get_base_layer().weight.dtype
    for linear in (a, b):
        linear.to(dtype)  # PEFT keeps adapters in fp32 beside weights in bf16
    if a.weight.device.type != "meta":
        bound = 1 / math.sqrt(a.in_features)
        a.weight.copy_(torch.empty(a.weight.shape).uniform_(-bound, bound, generator=generator))
        b.weight.zero_()


def _targets(model: Any, target_modules: str) -> list[str]:
    """The names in "c_attn|w1", each that of a linear layer in the language model."""
    language_model = model.language_model
    head = language_model.get_output_embeddings()  # which makes the loss itself, and stays whole
    names = {
        name.rpartition(".")[2] for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }  # fmt: skip
    wanted = [name.strip() for name in target_modules.split("|")]
    if missing := [name for name in wanted if name not in names]:
        raise ConfigError(
            f"lora.target_modules: {', '.join(map(repr, missing))} names no linear layer of the language model; it has "
            f"{', '.join(sorted(names))}, to be given as 'NAME|NAME'"
        )
    return wanted


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def stored_name(name: str) -> str:
    """A parameter's name in files: PEFT's of an adapter's, and of others the one without LoRA."""
    if is_adapter(name):
        return PREFIX + name.replace(f".{ADAPTER}.", ".")
    return name.replace(".base_layer.", ".")


def describe_adapter(model: nn.Module) -> str:
    """What scales a model's adapter, in words; empty if it has none. Its names and shapes do not show that."""
    found = getattr(model, "peft_config", {}).get(ADAPTER)
    return f", LoRA r={found.r} alpha={found.lora_alpha}" if found else ""


def split(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model's own weights, and its adapter's, by their names in files."""
    own = {stored_name(name): weight for name, weight in weights.items() if not is_adapter(name)}
    return own, {stored_name(name): weight for name, weight in weights.items() if is_adapter(name)}


# --- Folders ---


def write_adapter(
    model: Any,
    weights: dict[str, torch.Tensor],
    base: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    file_mode: int,
) -> None:
    """Writes the adapter of a model as PEFT does, with a tokenizer.

    weights: on the CPU, by their names in files. base: where the model it stands on will be. card: text of README.md.
    """
    folder.mkdir()
    model.peft_config[ADAPTER].save_pretrained(str(folder))
    set_base(folder, base)
    save_file(weights, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(file_mode)  # as export.write does


def set_base(folder: Path, base: Path) -> None:
    """Says in an adapter's folder where its base is, and that it is to be opened for use, not for training."""
    file = folder / ADAPTER_CONFIG
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": str(base.resolve()), "inference_mode": True}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def base_of(export: Path) -> Path:
    """The complete model of an export: itself, or the base of a LoRA adapter, which is the base/ beside it or else the
    folder that its adapter_config.json names.

    Raises CheckpointError if an adapter's base is gone, or the adapter is not LoRA's.
    """
    if not (export / ADAPTER_CONFIG).is_file():
        return export
    try:
        settings = json.loads((export / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind, named = settings["peft_type"], settings.get("base_model_name_or_path")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{export / ADAPTER_CONFIG}: cannot be read ({error!r})") from error
    if kind != "LORA":
        raise CheckpointError(f"{export}: an adapter of type {kind!r}, expected 'LORA'")
    beside = export.parent / BASE
    for folder in [beside] + [Path(named)] * bool(named):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{export}: a LoRA adapter whose base is gone: no model in {beside}, nor in {named!r}, which "
        f"its {ADAPTER_CONFIG} names as base_model_name_or_path; put its checkpoint's base/ beside it, or name it there"
    )


def merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Adds the adapter in a PEFT folder to the weights of its base, in their dtype: a plain model.

    Raises CheckpointError where its weights cannot be read, or are not those that its configuration promises.
    """
    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, "pt") as content:
            found = set(content.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of what is missing: an error below
            peft_model = PeftModel.from_pretrained(model, adapter, torch_device="cpu", autocast_adapter_dtype=False)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{adapter}: cannot be opened beside its base, by PEFT: {error}") from error
    expected = get_peft_model_state_dict(peft_model).keys()
    if differing := sorted(found ^ expected):
        what = "lacks" if differing[0] in expected else "has no place for"
        raise CheckpointError(
            f"{adapter / ADAPTER_WEIGHTS}: {len(differing)} weights are not those that {ADAPTER_CONFIG} and the base "
            f"ask for: it {what} {differing[0]}"
        )
    return peft_model.merge_and_unload()
