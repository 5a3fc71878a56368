"""Models in the proportions of real ones, and batches of known shape for them."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import conftest
import torch
import yaml
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen3Config, SiglipVisionConfig

from trainer.config import LoraConfig
from trainer.flops import BatchShape
from trainer.lora import add_adapter
from trainer.models.configuration_mqwen_vl import MQWenVLConfig
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.models.modeling_qwen import QWenLMHeadModel
from trainer.setup import packed_inputs

SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "kv_channels": 64,
         "intermediate_size": 1376, "vocab_size": 2000, "seq_length": 512}  # fmt: skip
"""A Qwen as wide for its depth as the real ones, intermediate to hidden size included."""

VISION = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512,
          "image_size": 64, "patch_size": 8}  # fmt: skip
"""A CLIP of 64 patches."""

CLIP_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
          "image_size": 224, "patch_size": 14, "projection_dim": 768}  # fmt: skip
"""CLIP-ViT-L/14. (source: openai/clip-vit-large-patch14)"""

QWEN = {
    "Qwen-1.8B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 11008},
    "Qwen-7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 22016},
}
"""Published sizes."""

PICTURE = 1999
"""The small model's placeholder."""


def small_model(dtype: torch.dtype = torch.float32, **settings: Any) -> MQWenForConditionalGeneration:
    """Random weights, training."""
    torch.manual_seed(0)
    config = MQWenVLConfig(QWenConfig(**SIZES), CLIPVisionConfig(**VISION), image_token_id=PICTURE, **settings)
    return MQWenForConditionalGeneration(config).to(dtype).train()


def add_lora(model: MQWenForConditionalGeneration, name: str) -> None:
    """What the name of a case says: "LoRA" with all linear layers, or LoRA "dropping out" with the usual ones."""
    if name.startswith("LoRA"):
        targets, dropout = ("c_attn|w1|w2", 0.1) if "dropping out" in name else ("c_attn|c_proj|w1|w2", 0.0)
        add_adapter(model, LoraConfig(r=24, dropout=dropout, target_modules=targets), seed=0)


def newer_model(dtype: torch.dtype = torch.float32, **settings: Any) -> MQWenForConditionalGeneration:
    """As `small_model`, of other parts: Qwen3 (grouped queries, heads wider together than the model and normed, a tied
    head) and SigLIP (no class token)."""
    torch.manual_seed(0)
    text = Qwen3Config(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
        intermediate_size=688, vocab_size=2000, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    config = MQWenVLConfig(text, SiglipVisionConfig(**VISION), image_token_id=PICTURE, **settings)
    return MQWenForConditionalGeneration(config).to(dtype).train()


def full_model(size: str) -> MQWenForConditionalGeneration:
    """A published size with CLIP-ViT-L, on the meta device."""
    with torch.device("meta"):
        return MQWenForConditionalGeneration(MQWenVLConfig(QWenConfig(**QWEN[size]), CLIPVisionConfig(**CLIP_L)))


def batch_of(
    model: MQWenForConditionalGeneration, packed: bool, width: int = 256, rows: int = 2
) -> tuple[dict[str, Any], BatchShape]:
    """Inputs of rows that each show a picture and supervise the last 40 tokens; packed, of documents of unlike length
    that do. And their shape."""
    patches, size, learnt = model.config.image_context_length, model.config.vision_config.image_size, 40
    lengths = [width * rows // 2, width * rows // 3, width * rows // 6] if packed else [width] * rows
    dtype = model.multi_modal_projector.linear_1.weight.dtype
    ids = [torch.cat((torch.full((patches,), PICTURE), torch.randint(0, 1900, (n - patches,)))) for n in lengths]
    labels = [torch.cat((torch.full((n - learnt,), -100), torch.randint(0, 1900, (learnt,)))) for n in lengths]
    inputs: dict[str, Any] = {"pixel_values": torch.randn(len(lengths), 3, size, size).to(dtype)}
    if not packed:
        inputs |= {"input_ids": torch.stack(ids), "labels": torch.stack(labels)}
        return inputs, BatchShape.padded(rows, width, rows, learnt * rows)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    inputs |= {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None]}
    inputs |= packed_inputs(ends, torch.device("cpu"))
    squares = sum((end - start) ** 2 for start, end in pairwise([0, *ends]))
    return inputs, BatchShape(sum(lengths), squares, len(lengths), learnt * len(lengths), packed=True)


def write_configs(folder: Path, size: str) -> None:
    """`qwen` and `clip`: the config.json of a published size, and nothing else."""
    for name, settings in (("qwen", {"model_type": "qwen", **QWEN[size]}),
                           ("clip", {"model_type": "clip_vision_model", **CLIP_L})):  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(settings))


def write_small_run(folder: Path) -> Path:
    """A configuration over models in real proportions, large enough that the headers of files do not count: its YAML
    file."""
    conftest.write_tiny_models(folder)
    conftest.write_tiny_shards(folder / "shards")
    # An odd vocabulary: nothing comes out even on two ranks.
    QWenLMHeadModel(QWenConfig(**{**SIZES, "num_hidden_layers": 2, "vocab_size": 3001})).save_pretrained(
        folder / "qwen"
    )
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder / "clip")
    config = {
        "run": {"output_dir": str(folder / "run")},
        "model": {
            "language_model": str(folder / "qwen"),
            "vision_tower": str(folder / "clip"),
            "tokenizer": str(folder / "tiny-qwen"),
        },
        "data": {
            "train": [{"name": "tiny", "shards": str(folder / "shards" / "*.tar")}],
            "max_length": 300,
            "num_workers": 0,
            "system_prompt": "",
        },
        "train": {"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 2, "bf16": False},
        "eval": {"every_steps": 0},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    return folder / "small.yaml"
