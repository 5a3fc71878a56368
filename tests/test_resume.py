"""A run that is stopped and resumed equals the run that was not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_shards
from ranks import TIMINGS, run_ranks
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from trainer.config import Config
from trainer.data.writer import ShardWriter
from trainer.dist import barrier
from trainer.errors import CheckpointError


def run(
    world, config_file: str, out: str, stage: str, changes: list[str], resume: str, until: int | None = None
) -> None:
    """Trains 20 steps, or, of those, the ones up to `until`."""
    from trainer.setup import setup
    from trainer.train import train

    settings = [
        f"run.output_dir={out}", f"model.vision_tower={Path(out).parent}/clip", f"deepspeed=ds_configs/{stage}.json",
        "train.max_steps=20", "checkpoint.save_steps=10", "checkpoint.keep_last=0", "logging.sample_keys=true",
        *changes,
    ]  # fmt: skip
    state = setup(Config.load(config_file, settings, world.world_size), world, resume)
    train(state, until)
    state.engine.destroy()


def straight_and_resumed(world, config_file: str, out: str, stage: str, changes: list[str]) -> None:
    run(world, config_file, f"{out}/straight", stage, changes, "none")
    run(world, config_file, f"{out}/resumed", stage, changes, "none", until=10)
    # Whatever becomes of the folder that the tower came from: the checkpoint has the frozen weights.
    if world.is_main:
        torch.manual_seed(1)
        CLIPVisionModel(CLIPVisionConfig.from_pretrained(f"{out}/clip")).save_pretrained(f"{out}/clip")
    barrier()
    run(world, config_file, f"{out}/resumed", stage, changes, "auto")


def exported(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint's export."""
    return {
        name: tensor for file in (checkpoint / "hf").glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def lines(folder: Path) -> list[dict]:
    ignored = TIMINGS
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ignored} for line in found]


MIXED = (
    "data.train=[{{name: a, shards: ['{0}/tiny-0*.tar', '{0}/tiny-1*.tar'], weight: 2}}, "
    "{{name: b, shards: '{0}/tiny-[23]*.tar', weight: 1}}]"
)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("zero2", []),
        ("zero3", []),
        ("zero1", ["train.bf16=true"]),
        # 20 steps of 4 packs, two thirds of the source of 12 samples: tens of its epochs.
        ("zero2", ["data.packing=true", "train.global_batch_size=4", MIXED]),
        pytest.param(
            "zero2", ["train.micro_batch_tokens=300", "model.activation_checkpointing=2"], marks=pytest.mark.long
        ),
        pytest.param(
            "zero3",
            ["model.activation_checkpointing=false", "model.fuse_elementwise=true", "data.num_workers=0"],
            marks=[
                pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"),
                pytest.mark.long,
            ],
        ),
    ],
    ids=[
        "zero2",
        "zero3",
        "zero1 in bf16",
        "packed and mixed",
        "by length, half recomputed",
        "kept, fused, no workers",
    ],
)
def test_resumed_run_equals_the_straight_one_bitwise(tiny_run, tmp_path, stage, changes):
    shutil.copytree(tiny_run.parent / "tiny-clip", tmp_path / "clip")
    changes = [change.format(tiny_run.parent / "shards") for change in changes]
    run_ranks(straight_and_resumed, 2, str(tiny_run), str(tmp_path), stage, changes)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert [line["step"] for line in lines(straight)] == list(range(1, 21))
    assert lines(resumed) == lines(straight)
    weights = [exported(run / "checkpoint-000020") for run in (straight, resumed)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    before = exported(straight / "checkpoint-000010")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, weights[0][name])}
    # What trains has moved between steps 10 and 20, the frozen tower has not.
    assert any(name.startswith("language_model.") for name in changed)
    assert any(name.startswith("multi_modal_projector.") for name in changed)
    assert not any(name.startswith("vision_tower.") for name in changed)


def resumed_on_other_shards(world, config_file: str, out: str) -> str:
    """What is said to a run that goes on after one of its shards was written anew."""
    from trainer.setup import setup
    from trainer.train import train

    settings = [
        f"run.output_dir={out}/run", f"data.train=[{{name: a, shards: '{out}/shards/*.tar'}}]", "data.num_workers=0"
    ]  # fmt: skip
    config = Config.load(config_file, settings, world.world_size)
    state = setup(config, world, "none")
    train(state, until=1)
    state.engine.destroy()
    with ShardWriter(Path(out, "shards"), "tiny-1") as writer:
        writer.write("new", {"json": {"messages": [{"role": "assistant", "content": "New."}]}})
    with pytest.raises(CheckpointError) as raised:
        setup(config, world, "auto")
    return str(raised.value)


def test_a_shard_that_changed_between_stop_and_resume_is_refused_by_name(tiny_run, tmp_path):
    write_tiny_shards(tmp_path / "shards")
    (said,) = run_ranks(resumed_on_other_shards, 1, str(tiny_run), str(tmp_path))
    saved = f"{tmp_path}/run/checkpoint-000001"
    assert said.startswith(f"{saved}: another run than this one: shard tiny-1-000000.tar has changed. Set them back")
    assert f"model.init_from={saved}" in said
