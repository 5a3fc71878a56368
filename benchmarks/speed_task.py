"""What the arms of a speed comparison train on: a model folder, shards with a known mix of lengths, a configuration.

The small models have the proportions of Qwen-1.8B and CLIP-ViT-L/14: the head is 20 % of the language model's linear
work, the tower is a quarter of its layers' size and reads as many positions as a picture has features. Everything a
sample is long is scaled down to a quarter (64 features a picture, texts alike), lest attention, whose share grows with
length over width, take a far larger part than at true size.
"""

import random
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from loader import photo
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainer.data.writer import ShardWriter
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_qwen import QWenLMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))

from demo_task import random_scene, write_vocabulary

SMALL_QWEN = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "kv_channels": 64, "intermediate_size": 1376,
    "vocab_size": 4752, "seq_length": 2048,
}  # fmt: skip
"""6·(4·256² + 3·256·688) weights in layers and 4,752·256 in the head: 20.4 % of the sum, as in Qwen-1.8B."""

SMALL_CLIP = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 512,
              "image_size": 112, "patch_size": 14}  # fmt: skip
DISTINCT_PICTURES = 64
"""Pictures that are made; samples take them in turn, and each is decoded anew."""

PACK = 512
"""Tokens of a pack of the small models, and of a sample at most; of real ones four times as many."""

Turns = list[tuple[str, str]]


def nlvr_like(rng: random.Random, scale: int) -> tuple[bool, Turns]:
    """A picture, a sentence about it, and a word for an answer: all samples are about equally long."""
    return True, [(f"{words(rng, scale * rng.randint(2, 4))} Is that true?", rng.choice(["true", "false"]))]


def llava_like(rng: random.Random, scale: int) -> tuple[bool, Turns]:
    """Conversations with a long tail of lengths, one in sixteen without a picture; more than half of the text is
    answers. (In the manner of LLaVA-1.5's mixture of 665k.)"""
    has_picture = rng.random() > 1 / 16
    left = min(350 * scale, int(scale * rng.lognormvariate(4.0, 0.8)))
    turns: Turns = []
    while left > 0 and len(turns) < 8:
        question, answer = scale * rng.randint(2, 5), min(left, max(2, int(scale * rng.lognormvariate(2.6, 1.0))))
        turns.append((words(rng, question), words(rng, answer)))
        left -= question + answer
    return has_picture, turns or [(words(rng, 4 * scale), words(rng, 4 * scale))]


MIXES = {"nlvr": nlvr_like, "llava": llava_like}


def words(rng: random.Random, count: int) -> str:
    """Text of about so many tokens."""
    found: list[str] = []
    while len(found) < count:
        found += random_scene(rng).caption.split()
    return " ".join(found[:count])


def conversation(has_picture: bool, turns: Turns) -> dict[str, Any]:
    """In LLaVA's JSON."""
    messages = [
        {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
    ]
    if has_picture:
        messages[0]["value"] = "<image>\n" + messages[0]["value"]
    return {"conversations": messages}


def write_shards(folder: Path, mix: str, samples: int, scale: int = 1) -> None:
    """Shards of JPEGs of 640 x 480 with conversations; a folder that is there is left as it is.

    scale: of the texts' lengths; 1 beside the small models' pictures of 64 tokens, 4 beside 256.
    """
    if folder.exists():
        return
    rng = random.Random(0)
    jpegs = [photo(seed, 640, 480) for seed in range(DISTINCT_PICTURES)]
    partial = folder.with_name(f".{folder.name}")
    with ShardWriter(partial, samples_per_shard=200) as writer:
        for number in range(samples):
            has_picture, turns = MIXES[mix](rng, scale)
            picture = {"jpg": jpegs[number % len(jpegs)]} if has_picture else {}
            writer.write(f"{number:06d}", {**picture, "json": conversation(has_picture, turns)})
    partial.rename(folder)


def write_small_models(folder: Path) -> None:
    """`qwen` and `clip`, random weights; folders that are there are left as they are."""
    if (folder / "clip").exists():
        return
    torch.manual_seed(0)
    QWenLMHeadModel(QWenConfig(**SMALL_QWEN)).save_pretrained(folder / "qwen")
    write_vocabulary(folder / "qwen" / "qwen.tiktoken", seed=0)
    CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}).save_pretrained(
        folder / "clip"
    )
    CLIPVisionModel(CLIPVisionConfig(**SMALL_CLIP)).save_pretrained(folder / "clip")


FREEZE = {"stage 1": ["vision_tower", "language_model"], "stage 2": ["vision_tower"]}
"""What does not train: in stage 1 the projector alone does, in stage 2 the language model too."""


def write_config(
    file: Path, stage: str, shards: Path, models: tuple[Path, Path], packs: tuple[int, int],
    deepspeed: str = "ds_configs/zero2.json", **changes: dict[str, Any],
) -> None:  # fmt: skip
    """A configuration at a constant rate.

    models: folders of language model and tower. packs: of a step, and of a micro-batch. deepspeed: its JSON, of this
    trainer. changes: of its sections.
    """
    config: dict[str, Any] = {
        "run": {"output_dir": str(file.with_suffix("")), "overwrite": True},
        "model": {"language_model": str(models[0]), "vision_tower": str(models[1]),
                  "fuse_elementwise": True},
        "freeze": FREEZE[stage],
        "deepspeed": deepspeed,
        "data": {"train": [{"name": "drawn", "shards": str(shards / "*.tar")}], "max_length": PACK, "packing": True,
                 "num_workers": 1},
        "optim": {"learning_rate": 1e-5, "projector_learning_rate": 1e-4, "schedule": "constant", "warmup_ratio": 0.0},
        "train": {"max_steps": 1_000_000, "global_batch_size": packs[0], "micro_batch_size": packs[1], "bf16": False},
        "eval": {"every_steps": 0},
    }  # fmt: skip
    for section, values in changes.items():
        config[section] |= values
    file.write_text(yaml.safe_dump(config))
