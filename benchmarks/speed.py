"""This trainer beside what people use today: the same weights, samples, steps, optimizer and precision.

    make benchmark        or:  python benchmarks/speed.py [--rounds 5] [--steps 2] [--work DIR] [--deepspeed JSON]

Small models in the proportions of Qwen-1.8B and CLIP-ViT-L/14, in fp32 on the CPU, in one process for each arm of
`arms.py`. (One process has nobody to share gradients with: this trainer takes ZeRO-1, which copies them once a step.)
The arms take rounds of steps by turns, and all must have the same losses and gradient norms. Prints a table and draws
it (`speed.svg` in the work folder): useful tokens a second (padding left out), and how many times faster the last arm
is, as the median over the rounds with the lowest and highest.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rounds import NAMES, Arm, ArmError, compare, differences, times_faster, tokens_per_second
from speed_task import FREEZE, MIXES, write_config, write_shards, write_small_models

PACKS = 8, 4
"""Of a step, and of a micro-batch."""
SAMPLES = 1200
WRITTEN = {"nlvr": "NLVR", "llava": "LLaVA"}

EXPECTED = {"stage 1": {"hf": 2.5, "notes": 5.0}, "stage 2": {"hf": 1.8}}
"""Times faster, aimed at."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each arm; default: 5")
    parser.add_argument("--steps", type=int, default=2, help="of a round; default: 2")
    parser.add_argument("--work", type=Path, help="folder for models, shards and the picture; default: a temporary one")
    parser.add_argument(
        "--deepspeed", default="ds_configs/zero1.json", metavar="JSON", help="of this trainer; default: %(default)s"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        write_small_models(work / "models")
        rows = []
        capability = torch.backends.cpu.get_cpu_capability()
        print(f"{os.cpu_count()} cores ({capability}), fp32, PyTorch {torch.__version__}; {args.rounds} rounds of "
              f"{args.steps} steps of {PACKS[0]} packs of 512 tokens; {args.deepspeed}\n")  # fmt: skip
        print("| trained | lengths | arm | useful tokens / s | this trainer is faster | aim |")
        print("|---|---|---|---|---|---|")
        for stage in FREEZE:
            for mix in MIXES:
                write_shards(work / mix, mix, SAMPLES)
                config = work / f"{mix}-{stage.replace(' ', '')}.yaml"
                models = work / "models/qwen", work / "models/clip"
                write_config(config, stage, work / mix, models, PACKS, args.deepspeed)
                try:
                    arms = compare(list(NAMES), config, 1, args.rounds, args.steps)
                except ArmError as error:
                    sys.exit(str(error))
                if wrong := differences(arms):
                    sys.exit("\n".join(wrong))
                rows += report(stage, mix, arms)
        draw(rows, work / "speed.svg")
    missed = [row for row in rows if row["aim"] and row["times"][0] < row["aim"]]
    for row in missed:
        what = f"{row['stage']}, {WRITTEN[row['mix']]}-like"
        print(f"\nshort of the aim: {what}: {row['times'][0]:.2f} times '{row['arm']}', aimed at {row['aim']}")


def report(stage: str, mix: str, arms: dict[str, Arm]) -> list[dict[str, Any]]:
    """Prints the lines of one comparison; what they say."""
    ours = arms["ours"]
    tokens = [step["tokens"] for step in ours.steps]
    rows = []
    for name, arm in arms.items():
        times, aim = times_faster(arm, ours), EXPECTED[stage].get(name)
        rate = tokens_per_second(arm, tokens)
        rows.append({"stage": stage, "mix": mix, "arm": name, "rate": rate, "times": times, "aim": aim})
        median, lowest, highest = times
        faster = "" if arm is ours else f"{median:.2f} x ({lowest:.2f} to {highest:.2f})"
        trained = "projector" if stage == "stage 1" else "projector and language model"
        cells = (trained, f"{WRITTEN[mix]}-like", NAMES[name], f"{rate:,.0f}", faster, f"{aim} x" if aim else "")
        print("| " + " | ".join(cells) + " |", flush=True)
    return rows


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Bars of useful tokens a second, a panel for each comparison."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["stage"], row["mix"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), sharey=True, layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        found = [row for row in rows if (row["stage"], row["mix"]) == panel]
        bars = axis.barh([NAMES[row["arm"]] for row in found], [row["rate"] for row in found],
                         color=["#1f77b4" if row["arm"] == "ours" else "#bbbbbb" for row in found])  # fmt: skip
        axis.bar_label(bars, [f"{row['rate']:,.0f}" for row in found], padding=-30, fontsize=8)
        axis.set_title(f"{panel[0]}, {WRITTEN[panel[1]]}-like")
        axis.set_xlabel("useful tokens / s")
    axes[0].invert_yaxis()  # which all share
    figure.savefig(file)
    print(f"\npicture: {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
