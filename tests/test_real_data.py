"""Real pictures and sentences over the real vocabulary, through the commands that a user types."""

import json
import shutil
from pathlib import Path
from statistics import mean

import pytest
import torch
import yaml
from commands import deepspeed
from ranks import script
from reference import shared
from transformers import CLIPVisionConfig, CLIPVisionModel

from trainer.data.index import open_index
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_qwen import QWenLMHeadModel

SAMPLES = 989


@pytest.fixture(scope="module")
def nlvr(tmp_path_factory) -> Path:
    """Shards of NLVR's development pictures, a tiny CLIP, and a tiny Qwen with the real vocabulary."""
    source, vocabulary = shared("real/nlvr/conversations.json"), shared("qwen/qwen.tiktoken")
    folder = tmp_path_factory.mktemp("nlvr")
    done = script(
        "launch/prepare_shards.py", "llava", str(source), "--images", str(source.parent / "images"),
        "--out", str(folder / "shards"), "--samples-per-shard", "300",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{SAMPLES} samples in 4 shards" in done.stdout
    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=151936, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_channels=16,
        intermediate_size=128, seq_length=512, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    QWenLMHeadModel(config).save_pretrained(folder / "qwen")
    shutil.copy(vocabulary, folder / "qwen" / "qwen.tiktoken")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(vision).save_pretrained(folder / "clip")
    return folder


def train_stage(folder: Path, name: str, settings: dict) -> list[dict]:
    """One stage on two ranks; its metrics."""
    config = {
        "run": {"name": name, "output_dir": str(folder / name)},
        "data": {
            "train": [{"name": "nlvr", "shards": str(folder / "shards" / "*.tar")}],
            "max_length": 256,
            "num_workers": 1,
        },
        "train": {"epochs": 1, "global_batch_size": 16, "micro_batch_size": 8, "bf16": False},
        "logging": {"sample_keys": True},
        **settings,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    deepspeed("--config", str(file))
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def assert_one_epoch_with_falling_loss(folder: Path, lines: list[dict]) -> None:
    # 989 samples in batches of 16: 61 full steps and one of 13.
    assert [len(line["samples"]) for line in lines] == [16] * 61 + [13]
    shards = [open_index(tar) for tar in sorted((folder / "shards").glob("*.tar"))]
    keys = sorted(shard.key(i) for shard in shards for i in range(len(shard)))
    assert sorted(key for line in lines for key in line["samples"]) == keys
    assert len(set(keys)) == SAMPLES
    parts = [mean(line["loss"] for line in part) for part in (lines[:15], lines[15:30], lines[30:45], lines[45:])]
    assert parts == sorted(parts, reverse=True), parts


@pytest.mark.long
def test_two_stages_on_nlvr_see_every_sample_once_and_learn(nlvr):
    stage1 = train_stage(
        nlvr, "stage1",
        {
            "model": {
                "language_model": str(nlvr / "qwen"),
                "vision_tower": str(nlvr / "clip"),
                "image_aspect": "squash",
            },
            "freeze": ["vision_tower", "language_model"],
            "optim": {"projector_learning_rate": 1e-2},
            "deepspeed": "ds_configs/zero2.json",
        },
    )  # fmt: skip
    assert_one_epoch_with_falling_loss(nlvr, stage1)
    stage2 = train_stage(
        nlvr, "stage2",
        {
            "model": {"init_from": str(nlvr / "stage1"), "activation_checkpointing": True},
            "freeze": ["vision_tower"],
            "optim": {"learning_rate": 3e-3},
            "deepspeed": "ds_configs/zero3.json",
        },
    )  # fmt: skip
    assert_one_epoch_with_falling_loss(nlvr, stage2)
    # Stage 2 goes on from what stage 1 has learnt, and gets further.
    assert stage2[0]["loss"] == pytest.approx(stage1[-1]["loss"], rel=0.05)
    assert stage2[-1]["loss"] < 0.5 * stage1[0]["loss"]
