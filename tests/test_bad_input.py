"""What a person sees who made a mistake: one message that says which and the way out, exit code 2, nothing saved.

Each launch is a real one, of one process; mistakes that are found together are made together.
"""

import shutil
from pathlib import Path

import pytest
from ranks import script
from transformers import CLIPVisionConfig, CLIPVisionModel

from trainer.errors import EXIT_USER_ERROR
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_qwen import QWenLMHeadModel


@pytest.fixture
def launch(tiny_run, tmp_path):
    """Runs launch/train.py on the tiny configuration with overrides: what it says on stderr when it gives up."""

    def train(*overrides: str) -> str:
        settings = f"run.output_dir={tmp_path}/run", "data.num_workers=0", "checkpoint.save_steps=1", *overrides
        done = script("launch/train.py", "--config", str(tiny_run), "--set", *settings, timeout=300)
        assert done.returncode == EXIT_USER_ERROR == 2, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr + done.stdout
        assert done.stderr.count("error: ") == 1
        assert not list(tmp_path.glob("run/*checkpoint-*"))
        assert not (tmp_path / "run" / "latest").exists()
        return done.stderr.partition("\nerror: ")[2]

    return train


def test_mistakes_in_the_configuration(launch, tiny_run, tmp_path):
    said = launch(
        "optim.learning_rat=1e-4", f"model.language_model={tmp_path}/nowhere", "train.global_batch_size=7",
        f"model.vision_tower={tiny_run.parent}/tiny-qwen", f"data.train=[{{name: a, shards: '{tmp_path}/*.tar'}}]",
    )  # fmt: skip
    assert said.splitlines() == [
        f"{tiny_run} with overrides: 5 mistakes",
        "  - optim.learning_rat: unknown key; did you mean 'learning_rate'?",
        f"  - model.language_model: no such folder: {tmp_path}/nowhere",
        f"  - model.vision_tower: {tiny_run.parent}/tiny-qwen is of architecture 'qwen', expected 'clip' or "
        "'clip_vision_model' or 'siglip' or 'siglip_vision_model'",
        f"  - data.train[0].shards: '{tmp_path}/*.tar' matches no file",
        "  - train.global_batch_size=7 is not a multiple of micro_batch_size x world size (2 x 1); nearest valid "
        "values: 6, 8",
    ]
    assert not (tmp_path / "run").exists()


def test_models_that_do_not_fit_tokenizer_and_lengths(launch, tiny_run, tmp_path):
    # A tokenizer has a token for each line of its vocabulary, 3 of ChatML and 205 more for control; the model has 300
    # in all. A picture of 64 pixels in patches of 8 takes (64 / 8)^2 = 64 tokens.
    qwen, clip = tmp_path / "qwen", tmp_path / "clip"
    tokens = len((tiny_run.parent / "tiny-qwen" / "qwen.tiktoken").read_text().splitlines()) + 3 + 205
    QWenLMHeadModel(
        QWenConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, kv_channels=8,
            intermediate_size=24,
        )
    ).save_pretrained(qwen)  # fmt: skip
    shutil.copy(tiny_run.parent / "tiny-qwen" / "qwen.tiktoken", qwen)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8
        )
    ).save_pretrained(clip)
    said = launch(f"model.language_model={qwen}", f"model.vision_tower={clip}", "data.max_length=64")
    assert f"the language model's vocabulary of 300 is smaller than the tokenizer's {tokens}" in said
    assert "model.tokenizer" in said
    assert "data.max_length=64 has no room for text beside an image of 64 features: raise it" in said


@pytest.fixture
def shards(tiny_run, tmp_path) -> Path:
    """A copy of the tiny shards, without their indexes."""
    return Path(shutil.copytree(tiny_run.parent / "shards", tmp_path / "shards", ignore=lambda *_: ["*.index.npz"]))


def test_truncated_tar(launch, shards):
    tar = sorted(shards.glob("*.tar"))[-1]
    with tar.open("r+b") as content:
        content.truncate(tar.stat().st_size // 2)
    said = launch(f"data.train=[{{name: a, shards: '{shards}/*.tar'}}]")
    assert said.startswith(f"{tar}: ")
    assert "make the shard again" in said or "copy the shard again" in said


def test_corrupt_picture(launch, shards, tmp_path):
    # Of the eleven samples of the last shard, the first one's picture. A batch of twelve is sure to hold it. One in
    # eleven is more than one in a hundred: the run stops, and says of what kind it is and where it is named.
    tar = sorted(shards.glob("*.tar"))[-1]
    content = bytearray(tar.read_bytes())
    start = content.index(b"\x89PNG")
    content[start : start + 60] = bytes(60)
    tar.write_bytes(content)
    said = launch(f"data.train=[{{name: a, shards: '{tar}'}}]", "train.global_batch_size=12")
    first, kind, way_out = said.splitlines()[:3]
    assert "bad samples up to step 1, more than data.max_bad_fraction=0.01 of 12:" in first
    assert kind.split()[:5] == [first.split()[0], "picture", "cannot", "be", "decoded"]
    assert "(such as: the picture cannot be decoded (" in kind
    assert f"{tmp_path}/run/bad_samples.jsonl names each" in way_out


def test_two_tars_with_the_same_samples(launch, shards):
    tar = sorted(shards.glob("*.tar"))[-1]
    shutil.copy(tar, shards / "copy.tar")
    said = launch(f"data.train=[{{name: a, shards: ['{tar}', '{shards}/copy.tar']}}]")
    assert said.startswith(f"{tar} and {shards}/copy.tar hold the same samples; leave one of them out")


def test_a_step_of_more_rows_than_there_are_is_worth_a_word(tiny_run, tmp_path):
    settings = f"run.output_dir={tmp_path}/run", "train.global_batch_size=48", "train.max_steps=1"
    done = script("launch/train.py", "--config", str(tiny_run), "--set", *settings, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "train.global_batch_size: a step takes 48 rows, and there are 24" in done.stdout
