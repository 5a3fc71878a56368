"""Fixtures shared by all tests: the smallest models that still have every part."""

import os
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml
from https_server import certificate, server  # noqa: F401  (fixtures)
from transformers import CLIPVisionConfig, CLIPVisionModel

from trainer.config import Config
from trainer.data.writer import ShardWriter
from trainer.load import load_model
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_mqwen import MQWenLMHeadModel
from trainer.models.modeling_qwen import QWenLMHeadModel
from trainer.models.tokenization_qwen import build_tokenizer
from trainer.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "launch"))

import demo_task  # noqa: E402

# On tensors this small a second thread gains nothing, and on a busy machine each operation would wait for it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # nor do other processes: how many there are changes the last bits of a sum

OTHER_CONFIG = {"replace_token_id": 300, "image_context_length": 6, "image_feature_hidden_size": 64}
"""The tiny model's placeholder, as that of the golden checkpoint: an image is six features wide."""


def tiny_language_model(config: QWenConfig, seed: int = 0) -> MQWenLMHeadModel:
    """A seeded model in eval whose biases and norms are random too: at 0 and 1 a lost one would not show."""
    torch.manual_seed(seed)
    model = MQWenLMHeadModel(config, OTHER_CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


FAULTS: list[tuple[str, ...]] = []
"""Rows of the table of faults, in the process that reports, whichever ran the tests."""


@pytest.fixture
def fault(request):
    """Adds a row to the table of faults that is printed at the end: fault(what, seen, lost or repeated, equal)."""

    def add(what: str, seen: str, lost: str = "none", equal: str = "yes") -> None:
        request.node.user_properties.append(("fault", (what, seen, lost, equal)))

    return add


def pytest_runtest_logreport(report) -> None:
    if report.when == "teardown":
        FAULTS.extend(tuple(row) for name, row in report.user_properties if name == "fault")


def pytest_terminal_summary(terminalreporter) -> None:
    if not FAULTS:
        return
    rows = [
        ("fault", "what was seen", "samples lost or repeated", "equal to the undisturbed run, bit for bit"),
        *FAULTS,
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    terminalreporter.section("faults that were planted")
    for row in rows:
        terminalreporter.write_line("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))


@pytest.fixture
def tiny_config() -> QWenConfig:
    return QWenConfig(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        kv_channels=16,
        intermediate_size=192,
        seq_length=64,
        max_position_embeddings=128,
        initializer_range=0.08,
        fp32=True,
    )


@pytest.fixture
def tiny_model(tiny_config) -> MQWenLMHeadModel:
    return tiny_language_model(tiny_config)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A configuration over tiny models and shards, every part of it trainable but the tower: its YAML file.

    The samples are of every kind, in shards of odd sizes: one picture, two pictures, none.
    """
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_models(folder)
    write_tiny_shards(folder / "shards")
    config = {
        "run": {"name": "tiny", "output_dir": str(folder / "run")},
        "model": {
            "language_model": str(folder / "tiny-qwen"),
            "vision_tower": str(folder / "tiny-clip"),
            "activation_checkpointing": True,
        },
        "data": {
            "train": [{"name": "tiny", "shards": str(folder / "shards" / "*.tar")}],
            "max_length": 128,
            "num_workers": 1,
            "system_prompt": "",
        },
        "optim": {"learning_rate": 2e-3, "projector_learning_rate": 5e-3, "weight_decay": 0.01, "warmup_ratio": 0.1},
        "train": {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "bf16": False},
        "eval": {"every_steps": 0},
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture(scope="session")
def tiny_export(tiny_run, tmp_path_factory) -> Path:
    """The model of `tiny_run` as an exported folder: what it answers is nonsense, but depends on all it is given."""
    config = Config.load(tiny_run, [], world_size=1)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config, tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    folder = tmp_path_factory.mktemp("export")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tiny_models(folder: Path) -> None:
    """`tiny-qwen` (with a vocabulary) and `tiny-clip`, random weights, 4 features a picture."""
    (folder / "tiny-qwen").mkdir()
    demo_task.write_vocabulary(folder / "tiny-qwen" / "qwen.tiktoken", seed=0)
    vocabulary = len(build_tokenizer(folder / "tiny-qwen" / "qwen.tiktoken"))
    torch.manual_seed(0)
    QWenLMHeadModel(
        QWenConfig(
            vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_channels=16,
            intermediate_size=96, seq_length=256, max_position_embeddings=256,
        )
    ).save_pretrained(folder / "tiny-qwen")  # fmt: skip
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    ).save_pretrained(folder / "tiny-clip")


def write_tiny_shards(folder: Path, sizes: tuple[int, ...] = (7, 5, 1, 11)) -> None:
    """Shards of so many samples: of every four, two with one picture, one with two, one with none."""
    rng = random.Random(0)
    for number, size in enumerate(sizes):
        with ShardWriter(folder, f"tiny-{number}", samples_per_shard=1000) as writer:
            for i in range(size):
                scene = demo_task.random_scene(rng)
                turns = demo_task.conversation(scene, rng if i % 2 else None)
                images = (1, 2, 1, 0)[i % 4]
                turns[0]["value"] = turns[0]["value"].replace("<image>\n", "<image>" * images)
                pictures = {f"{n}.png": demo_task.draw(scene, rng) for n in range(images)}
                writer.write(f"s{number}-{i}", {**pictures, "json": {"conversations": turns}})
