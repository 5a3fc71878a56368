"""Whether steps grow slower, or memory larger, over a long run.

    python benchmarks/slope.py [--steps 2000]

Trains a tiny model so many steps as a run does (data workers, packs, ZeRO-2, metrics). After each, another process,
which keeps nothing, does a fixed computation of the same kind: where the machine becomes slower, or faster, both do. A
line is fitted through how many times longer a step takes, and one through the training process's
memory, the first tenth of the steps left out. Leaves with 1 if, over the whole run, steps become more than 5 % slower
or memory grows by more than 2 %, as the slope has it.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))

from demo_task import write_shards, write_vocabulary
from transformers import CLIPVisionConfig, CLIPVisionModel

from trainer.config import Config
from trainer.dist import distributed, world_from_environment
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_qwen import QWenLMHeadModel

SLOWER, LARGER = 0.05, 0.02
"""Over the whole run, relative to its median."""


def language_model() -> QWenLMHeadModel:
    """A tiny one, of random weights."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_channels": 32}
    return QWenLMHeadModel(QWenConfig(vocab_size=800, intermediate_size=344, seq_length=256, **sizes))


def write_run(folder: Path, steps: int) -> Path:
    """A tiny model, its shards and its configuration."""
    language_model().save_pretrained(folder / "qwen")
    write_vocabulary(folder / "qwen" / "qwen.tiktoken", seed=0)
    CLIPVisionModel(
        CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         image_size=48, patch_size=16)
    ).save_pretrained(folder / "clip")  # fmt: skip
    write_shards(folder / "shards", 500, seed=0, with_questions=True)
    config = {
        "run": {"output_dir": str(folder / "run")},
        "model": {"language_model": str(folder / "qwen"), "vision_tower": str(folder / "clip")},
        "data": {"train": [{"name": "drawn", "shards": str(folder / "shards" / "*.tar")}], "max_length": 256,
                 "packing": True, "num_workers": 1},
        "train": {"max_steps": steps, "global_batch_size": 2, "micro_batch_size": 1, "bf16": False},
        "eval": {"every_steps": 0}, "checkpoint": {"save_steps": 10 * steps},
        "logging": {"every_steps": max(1, steps // 4)},
    }  # fmt: skip
    (folder / "slope.yaml").write_text(yaml.safe_dump(config))
    return folder / "slope.yaml"


def compute_when_asked(line: Connection) -> None:
    """Answers everything that comes with the seconds of the same forward and backward passes."""
    model, ids = language_model().train(), torch.arange(512)[None] % 800
    while line.recv():
        started = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        line.send(time.perf_counter() - started)


def growth(values: np.ndarray) -> float:
    """Of a line through the values, from its start to its end, relative to their median. Each value is the median of
    its neighbourhood: a pause of the machine says nothing."""
    blocks = np.array([np.median(block) for block in np.array_split(values, 50)])
    slope, _ = np.polyfit(np.arange(len(blocks)), blocks, 1)
    return float(slope * (len(blocks) - 1) / np.median(blocks))


def report(first: int, seconds: np.ndarray, beside: np.ndarray, resident: np.ndarray) -> None:
    """Prints a table and the slopes, and leaves with 1 where these are too steep. The arrays: a value for each step
    after the first so many: its seconds, those of the fixed computation, bytes."""
    slower, larger = growth(seconds / beside), growth(resident)
    print("| steps | a step, ms | the fixed computation, ms | times | memory, MiB |\n|---|---|---|---|---|")
    for part in np.array_split(np.arange(len(seconds)), 9):
        of_part = [np.median(values[part]) for values in (seconds, beside, seconds / beside, resident)]
        print(f"| {first + part[0] + 1:,} to {first + part[-1] + 1:,} | {1000 * of_part[0]:.1f} | "
              f"{1000 * of_part[1]:.1f} | {of_part[2]:.3f} | {of_part[3] / 2**20:,.1f} |")  # fmt: skip
    print(f"\nover {first + len(seconds):,} steps, a step takes {slower:+.1%} time, with that of the fixed computation "
          f"taken out (alone {growth(seconds):+.1%}, {growth(beside):+.1%}), and {larger:+.1%} memory")  # fmt: skip
    if slower > SLOWER or larger > LARGER:
        sys.exit(f"expected at most {SLOWER:+.0%} and {LARGER:+.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    from trainer import train as loop
    from trainer.setup import setup

    spawn = multiprocessing.get_context("spawn")
    asked, answers = spawn.Pipe()
    other = spawn.Process(target=compute_when_asked, args=(answers,), daemon=True)
    other.start()
    answers.close()  # so that its end is noticed
    process, step = psutil.Process(), loop.train_step
    memory: list[int] = []
    fixed: list[float] = []

    def noting_step(*arguments):
        line = step(*arguments)
        memory.append(process.memory_info().rss)
        asked.send(True)
        fixed.append(asked.recv())
        return line

    loop.train_step = noting_step
    world = world_from_environment()
    with tempfile.TemporaryDirectory() as folder, distributed(world):
        config = Config.load(write_run(Path(folder), args.steps), [], world.world_size)
        state = setup(config, world, "none")
        loop.train(state)
        state.engine.destroy()
        lines = [json.loads(line) for line in (state.output_dir / "metrics.jsonl").read_text().splitlines()]
    asked.send(False)
    first = args.steps // 10
    seconds = np.array([line["step_time"] for line in lines[first:]])
    beside, resident = np.array(fixed[first:]), np.array(memory[first:], dtype=float)
    report(first, seconds, beside, resident)


if __name__ == "__main__":
    main()
