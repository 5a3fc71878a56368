"""The parts of a model as folders of their own: the language model for Qwen's own code, the projector, the tower by
reference."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.models.modeling_qwen import QWenLMHeadModel
from trainer.models.tokenization_qwen import VOCABULARY_FILE, write_tiktoken

PROJECTOR = "projector"
"""Name of its two files: the weights, and what they fit."""


def write_language_model(model: MQWenForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """A folder as the language model's own: of a Qwen (v1) with the names and fields of the official ones, and
    qwen.tiktoken. It takes the place of the official folder, in `model.language_model` too."""
    language_model = model.language_model
    language_model.generation_config = model.generation_config
    language_model.save_pretrained(out)
    # Both name the whole model's processor; the second is from the file that the tokenizer was read from.
    tokenizer._set_processor_class(None)
    tokenizer.init_kwargs.pop("processor_class", None)
    tokenizer.save_pretrained(out)
    if isinstance(language_model.config, QWenConfig):
        config: Any = copy.deepcopy(language_model.config)
        config.architectures = [QWenLMHeadModel.__name__]
        # By these the official code chooses its type.
        config.bf16, config.fp16, config.fp32 = (
            language_model.dtype == dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)
        )
        config.save_pretrained(out)
        write_tiktoken(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False), out / VOCABULARY_FILE)


def write_projector(model: MQWenForConditionalGeneration, out: Path) -> None:
    """projector.safetensors, and projector.json: between which tower and which width it stands."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.contiguous() for name, weight in model.multi_modal_projector.state_dict().items()}
    save_file(weights, out / f"{PROJECTOR}.safetensors", {"format": "pt"})
    vision = model.config.vision_config
    described = {
        "vision_tower": {
            "model_type": vision.model_type,
            "name": model.config.base_models.get("vision_tower"),
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "sha256": weights_hash(model.vision_tower),
        },
        "vision_feature_layer": model.config.vision_feature_layer,
        "image_aspect": model.config.image_aspect,
        "hidden_size": model.config.text_config.hidden_size,
    }
    (out / f"{PROJECTOR}.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 over a module's weights, in the order of their names: name, dtype, shape and bytes of each."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
