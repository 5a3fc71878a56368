"""Results of the notes' own code (WatchTower-Liu/VLM-learning) become an export.

    adapter_config.json, adapter_model.bin    LoRA in the language model, by PEFT's names
    other_params.bin                          the projector: 0.weight, 0.bias, 2.weight, 2.bias

Both .bin files are pickles; tensors alone are read from them, never code.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from transformers import PreTrainedModel

from trainer.config import ModelConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.folders import language_config, read_json, read_model, read_pickle, tower_config
from trainer.load import generation_config, new_settings
from trainer.lora import ADAPTER_CONFIG
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.publish import check_free, into, write_model
from trainer.tokenizer import image_token_id, load_tokenizer

ADAPTER_FILE, PROJECTOR_FILE = "adapter_model.bin", "other_params.bin"

SYSTEM_PROMPT = "你是一位图像理解助手。"
"""That the notes' code trains with."""

CARD = (
    "A model of the notes (WatchTower-Liu/VLM-learning), its adapter merged, as `launch/import_notes.py` joined it.\n"
)

PROJECTOR_NAMES = {"0": "linear_1", "2": "linear_2"}
"""Place in the notes' nn.Sequential -> name here. Between them is GELU."""


def import_notes(language_model: Path, vision_tower: Path, notes: Path, out: Path) -> None:
    """Joins the folders that the notes' code trained on, with what it saved merged in, into an export.

    Raises ConfigError where a folder is missing or `out` is not empty, CheckpointError where files cannot be read, hold
    anything but tensors, or do not fit the models.
    """
    for folder in (language_model, vision_tower, notes):
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
    if missing := [name for name in (ADAPTER_CONFIG, ADAPTER_FILE, PROJECTOR_FILE) if not (notes / name).is_file()]:
        raise CheckpointError(f"{notes}: no {' and no '.join(missing)}; the notes' code writes them side by side")
    check_free(out)
    adapter, projector = read_pickle(notes / ADAPTER_FILE), read_pickle(notes / PROJECTOR_FILE)
    settings = ModelConfig(language_model=str(language_model), vision_tower=str(vision_tower))
    tokenizer = load_tokenizer(settings)
    text = read_model(language_config(language_model), language_model, "auto")
    model = MQWenForConditionalGeneration.from_parts(
        read_model(tower_config(vision_tower), vision_tower, text.dtype), merged(text, notes, adapter),
        image_token_id=image_token_id(tokenizer), **new_settings(settings),
    )  # fmt: skip
    set_projector(model.multi_modal_projector, projector, notes / PROJECTOR_FILE)
    model.generation_config = generation_config(tokenizer)
    into(out, lambda partial: write_model(model, tokenizer, partial, SYSTEM_PROMPT, CARD))


def merged(language_model: PreTrainedModel, notes: Path, adapter: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The language model with an adapter's weights added to its own."""
    if (kind := read_json(notes / ADAPTER_CONFIG).get("peft_type")) != "LORA":
        raise CheckpointError(f"{notes / ADAPTER_CONFIG}: an adapter of type {kind!r}, expected 'LORA'")
    file = notes / ADAPTER_FILE
    try:
        peft_model: Any = PeftModel(language_model, LoraConfig.from_pretrained(str(notes)))
        result: Any = set_peft_model_state_dict(peft_model, adapter)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: does not fit the language model: {error}") from error
    wrong = [f"{name} has no place" for name in result.unexpected_keys]
    wrong += [f"{name} is missing" for name in result.missing_keys if ".lora_" in name]
    if wrong:
        raise CheckpointError(f"{file}: does not fit the language model and {ADAPTER_CONFIG}: {'; '.join(wrong[:3])}")
    return peft_model.merge_and_unload()


@torch.no_grad()
def set_projector(projector: torch.nn.Module, weights: dict[str, torch.Tensor], file: Path) -> None:
    """Takes over the notes' projector, in this one's dtype."""
    expected = {
        f"{place}.{kind}": getattr(getattr(projector, name), kind)
        for place, name in PROJECTOR_NAMES.items() for kind in ("weight", "bias")
    }  # fmt: skip
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    shapes = {name: tuple(weight.shape) for name, weight in expected.items()}
    if found != shapes:
        raise CheckpointError(f"{file}: expected a projector of {shapes} for these models, found {found}")
    for name, weight in expected.items():
        weight.copy_(weights[name])
