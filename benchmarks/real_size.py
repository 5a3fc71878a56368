"""Stage 1 at true size, with random weights: does it fit, in how much memory, and how large is a checkpoint?

    python benchmarks/real_size.py --work DIR [--tiktoken qwen.tiktoken]

Makes folders in the layouts of Qwen-1.8B and CLIP-ViT-L/14 and a few shards in DIR (13 GB with the checkpoints, kept
for the next time), then trains two steps on one rank under ZeRO-2 in bf16, saving after each, and resumes for a third.
Prints losses, peak memory, and what each checkpoint adds on the disk.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config import Config
from trainer.dist import distributed, world_from_environment

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "launch"))

from demo_task import write_shards, write_vocabulary  # noqa: E402

LIMIT_GIB = 20
STEPS = 2
"""Before the run is resumed for one more."""
LIMIT_SHARE = 0.05
"""Of the model's bytes, that a checkpoint may add once the frozen weights are on the disk."""


class ProductsInFp32(TorchDispatchMode):
    """Matrix products of bf16 tensors, computed in fp32 and rounded to bf16; everything stored stays bf16.

    For a CPU without bf16 instructions, where PyTorch multiplies in a scalar loop, some hundred times slower.
    """

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function.overloadpacket not in self.PRODUCTS or args[-1].dtype != torch.bfloat16:
            return function(*args, **kwargs)
        out = kwargs.pop("out", None)
        product = function.overloadpacket(*(a.float() if torch.is_tensor(a) else a for a in args), **kwargs)
        return product.bfloat16() if out is None else out.copy_(product)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for weights, shards and the run")
    parser.add_argument("--tiktoken", type=Path, help="the real vocabulary; by default a small one is made")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    vocabulary = args.tiktoken
    if vocabulary is None:
        vocabulary = work / "small.tiktoken"
        write_vocabulary(vocabulary, seed=0)
    models = [sys.executable, str(ROOT / "benchmarks" / "random_models.py"), "--out", str(work)]
    subprocess.run([*models, "--tiktoken", str(vocabulary)], check=True)
    if not (work / "shards").exists():
        write_shards(work / "shards", 8, seed=0, with_questions=True)
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    started = time.monotonic()
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        train(work, run)
    else:
        print("this CPU has no bf16 instructions: matrix products are computed in fp32", flush=True)
        with ProductsInFp32():
            train(work, run)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        print("step {step}: loss {loss:.4f}, grad norm {grad_norm:.3f}, {tokens} tokens".format(**line))
    print(f"peak memory {peak:.1f} GiB (limit {LIMIT_GIB}), {time.monotonic() - started:.0f} s")
    largest = checkpoint_sizes(run)
    if len(lines) != STEPS + 1 or peak > LIMIT_GIB or largest > LIMIT_SHARE:
        sys.exit(1)


def checkpoint_sizes(run: Path) -> float:
    """Prints what each checkpoint adds on the disk; the largest share of the model's bytes, the first one apart."""
    seen: set[int] = set()
    shares = []
    for path in sorted(run.glob("checkpoint-*")):
        stats = [file.stat() for file in path.rglob("*") if file.is_file()]
        added = sum(stat.st_size for stat in stats if stat.st_ino not in seen)
        seen |= {stat.st_ino for stat in stats}
        model = sum(file.stat().st_size for file in (path / "hf").glob("*.safetensors"))
        shares.append(added / model)
        share = f"{added / model:.1%} of the model's {model / 1e6:,.0f} MB"
        print(f"{path.name}: adds {added / 1e6:,.0f} MB to the disk, {share}")
    return max(shares[1:])


def train(work: Path, run: Path) -> None:
    """The steps, as launch/train.py runs them, and one more after a resume."""
    settings = [
        f"run.output_dir={run}", f"model.language_model={work / 'Qwen-1_8B'}",
        f"model.vision_tower={work / 'clip-vit-large-patch14'}",
        f"data.train=[{{name: drawn, shards: '{work}/shards/*.tar'}}]", "data.num_workers=1", "train.epochs=null",
        f"train.max_steps={STEPS + 1}", "checkpoint.save_steps=1", "checkpoint.keep_last=0",
        "train.global_batch_size=1", "train.micro_batch_size=1", "train.bf16=true",
    ]  # fmt: skip
    from trainer.setup import setup
    from trainer.train import train as run_steps

    world = world_from_environment()
    config = Config.load("stage1", settings, world.world_size)
    with distributed(world):
        for resume, until in (("none", STEPS), ("auto", STEPS + 1)):
            state = setup(config, world, resume)
            run_steps(state, until)
            state.engine.destroy()


if __name__ == "__main__":
    main()
