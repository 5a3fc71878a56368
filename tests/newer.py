"""Tiny folders of newer language models and towers, laid out as the official ones."""

import json
from pathlib import Path
from typing import Any

import demo_task
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipConfig,
    SiglipModel,
)

from trainer.models.tokenization_qwen import build_tokenizer

LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 16, "patch_size": 8}  # fmt: skip
TEXT_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "vocab_size": 50}  # fmt: skip

CONTROL = {"qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}
CONTROL["qwen3"] = [*CONTROL["qwen2"], "<|image_pad|>"]
"""Qwen2 has no placeholder for pictures; Qwen2.5 and Qwen3 have one."""


def write_language_model(folder: Path, kind: str, free_rows: int = 4) -> None:
    """Qwen2 with a tied head, or Qwen3 without and with heads that are wider together than the model; with a
    tokenizer.json, and embeddings of so many rows more than tokens."""
    folder.mkdir()
    tokens = write_tokenizer(folder, CONTROL[kind])
    sizes: dict[str, Any] = {**LAYERS, "vocab_size": tokens + free_rows}
    torch.manual_seed(0)
    if kind == "qwen2":
        config: Any = Qwen2Config(**sizes, tie_word_embeddings=True)
    else:
        config = Qwen3Config(**sizes, head_dim=12, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_tokenizer(folder: Path, control: list[str]) -> int:
    """tokenizer.json with these control tokens behind the demo's vocabulary; how many tokens it has."""
    demo_task.write_vocabulary(folder / "qwen.tiktoken", seed=0)
    backend = json.loads(build_tokenizer(folder / "qwen.tiktoken").backend_tokenizer.to_str())
    (folder / "qwen.tiktoken").unlink()
    added = backend["added_tokens"][: len(control)]
    for token, content in zip(added, control, strict=True):
        token["content"] = content
    backend["added_tokens"] = added
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template="{{ messages[0]['content'] + ' as Qwen2 has it' }}",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_tower(folder: Path, kind: str) -> None:
    """The whole of CLIP or SigLIP, text tower included, and what SigLIP says of its pictures."""
    torch.manual_seed(0)
    if kind == "clip":
        CLIPModel(CLIPConfig(text_config=TEXT_TOWER, vision_config=TOWER)).save_pretrained(folder)
        return
    SiglipModel(SiglipConfig(text_config=TEXT_TOWER, vision_config=TOWER)).save_pretrained(folder)
    settings = {"image_processor_type": "SiglipImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
                "resample": 2, "size": {"height": 16, "width": 16}}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
