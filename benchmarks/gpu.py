"""The comparison at true size, on one GPU: random weights of Qwen-1.8B and 7B with CLIP-ViT-L/14, in bf16.

    python benchmarks/gpu.py [--work DIR] [--minutes 9] [--small]

Makes weights and JPEG shards in the work folder (25 GB; kept for the next time), then trains, for each of 1.8B with the
projector, 7B with the projector, and 1.8B with the language model too: this trainer, HF Trainer under DeepSpeed ZeRO-2
and, for 1.8B, a plain PyTorch loop around our model. Prints a table: useful tokens and images a second, MFU, HFU, peak
memory beside what was planned, and the share of the time that goes into waiting for data. What there is no time for is
"not measured", and so is a comparison whose own arm fails. Leaves with 1, at the end, where losses or gradient norms
differ between arms, or an arm fails. --small: the same program with the small models, on whatever device there is, as a
rehearsal.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rounds import NAMES, Arm, differences, one_by_one, tokens_per_second
from speed_task import PACK, write_config, write_shards, write_small_models

from trainer.config import Config
from trainer.memory import usable
from trainer.meters import peak_flops

RUNS = [("1.8b", "stage 1", ["ours", "hf", "hf-kept", "pytorch"]), ("7b", "stage 1", ["ours", "hf"]),
        ("1.8b", "stage 2", ["ours", "hf", "pytorch"])]  # fmt: skip
FOLDERS = {"1.8b": "Qwen-1_8B", "7b": "Qwen-7B"}
ROUNDS, STEPS, PACKS = 2, 3, (16, 4)
FASTER = {("1.8b", "stage 1"): 3.0, ("1.8b", "stage 2"): 2.0}
"""Times faster than HF Trainer, aimed at on an H100; and 50 % MFU of 7B in stage 1."""
SHORTEST = 60
"""Seconds that a comparison needs: with less left, it is not begun."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_benchmark"))
    parser.add_argument("--minutes", type=float, default=9.0, help="in which all must be done; default: 9")
    parser.add_argument("--small", action="store_true", help="the small models: a rehearsal")
    args = parser.parse_args()
    if not (args.small or torch.cuda.is_available()):
        sys.exit("there is no GPU here: `--small` rehearses without one")
    ends = time.monotonic() + 60 * args.minutes
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    small = args.small
    write_small_models(work / "small")
    shards = work / ("small-llava" if small else "llava")
    write_shards(shards, "llava", 1200, 1 if small else 4)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    print(f"{device}, PyTorch {torch.__version__}, {'fp32, small models' if small else 'bf16'}, LLaVA-like lengths\n")
    print("| model | trained | arm | useful tokens / s | images / s | MFU | HFU | peak memory, GiB | planned | waiting "
          "for data | times |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    if not small:
        for size in FOLDERS:  # before anything is timed
            write_models(work, size)
    failures: list[str] = []
    for model, stage, names in RUNS:
        config = work / f"{model}-{stage.replace(' ', '')}.yaml"
        clip = work / "clip-vit-large-patch14"
        folders = (work / "small/qwen", work / "small/clip") if small else (work / FOLDERS[model], clip)
        data = {"max_length": PACK, "num_workers": 1} if small else {"max_length": 4 * PACK, "num_workers": 6}
        write_config(config, stage, shards, folders, PACKS, data=data, train={"bf16": not small})
        arms: dict[str, Arm] = {}
        if time.monotonic() + SHORTEST < ends:
            arms, failed = one_by_one(names, config, 1 if small else 2, ROUNDS, STEPS, ends)
            failures += failed
        if "ours" in arms:
            report(model, stage, config, arms)
            failures += differences(arms)
        for name in names:
            if "ours" not in arms or name not in arms:
                print(f"| {model} | {stage} | {NAMES[name]} | not measured | | | | | | | |", flush=True)
    if failures:
        sys.exit("\n" + "\n".join(failures))


def write_models(work: Path, size: str) -> None:
    """Random weights in the official layout, with a small vocabulary beside them. Leaves where they cannot be
    written."""
    program = [sys.executable, str(Path(__file__).with_name("random_models.py")), "--out", str(work)]
    vocabulary = str(work / "small/qwen/qwen.tiktoken")
    command = [*program, "--language-model", size, "--tiktoken", vocabulary]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        sys.exit("the weights could not be written")


def report(model: str, stage: str, config: Path, arms: dict[str, Arm]) -> None:
    """Prints the lines of one comparison."""
    ours = arms["ours"]
    tokens = [step["tokens"] for step in ours.steps]
    images = sum(step["images"] for step in ours.steps) / sum(tokens)
    tflops = statistics.median(step["tflops"] for step in ours.steps)
    seconds = statistics.median(ours.seconds)
    peak = peak_flops(torch.cuda.get_device_name(), True) if torch.cuda.is_available() else None
    for name, arm in arms.items():
        own = statistics.median(arm.seconds)
        rate = tokens_per_second(arm, tokens)
        mfu = f"{tflops * 1e12 * seconds / own / peak:.1%}" if peak else "not known"
        hfu = f"{statistics.median(step['hfu'] for step in arm.steps):.1%}" if peak and arm is ours else ""
        plan = f"{planned(config) / 2**30:.1f}" if arm is ours else ""
        waiting = ""
        if "data_time" in arm.steps[0]:
            waiting = f"{sum(step['data_time'] for step in arm.steps) / sum(f['seconds'] for f in arm.rounds):.1%}"
        times = "" if arm is ours else f"{own / seconds:.2f}"
        if name == "hf" and (model, stage) in FASTER:
            times += f" (aim {FASTER[model, stage]})"
        memory = max(found["peak"] for found in arm.rounds) / 2**30
        cells = (model, stage, NAMES[name], f"{rate:,.0f}", f"{rate * images:,.1f}", mfu, hfu, f"{memory:.1f}", plan)
        print("| " + " | ".join((*cells, waiting, times)) + " |", flush=True)


def planned(config: Path) -> float:
    """Bytes at the peak of this trainer's tensors, as the plan has it."""
    from trainer.activations import activation_bytes
    from trainer.run_plan import make_plan

    plan: Any = make_plan(Config.load(config), 1)
    room = usable(torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 2.0**40)
    batch = plan.rows.largest_batch(plan.config)
    return plan.own.sharding.states().total(activation_bytes(plan.model, batch, plan.recompute_every(room)))


if __name__ == "__main__":
    main()
