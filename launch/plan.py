"""What a run will take, before a GPU is busy: memory a rank, the largest micro-batch, time, disk.

    python launch/plan.py --config X [--world-size N] [--set section.key=value ...] [--gpu-memory 80GiB]
        [--mfu 0.4] [--peak-tflops 989] [--measure]

Reads config.json files and the shards' indexes, and no weights; needs no GPU. Without the shards it plans on full rows,
and says so. A model that an earlier stage has yet to make is planned from its parts:
--set model.init_from=null model.language_model=DIR model.vision_tower=DIR. With --measure it loads the model and takes
two real steps on this machine, in a run folder that is thrown away.
"""

import argparse
import logging
import math
import os
import signal

import torch

from trainer.config import Config
from trainer.dist import distributed, log, world_from_environment
from trainer.errors import ConfigError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one in launch/configs/")
    parser.add_argument("--world-size", type=int, help="ranks, one a GPU; default: those of the launcher, or 1")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides of the YAML"
    )
    parser.add_argument("--gpu-memory", default="80GiB", help="of one GPU, as nvidia-smi says; default: 80GiB")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is assumed; default: 0.4")
    parser.add_argument("--peak-tflops", type=float, help="of one GPU; default: an H100's, 989 in bf16, 67 in fp32")
    parser.add_argument("--measure", action="store_true", help="run two steps of the largest batch, and compare")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # injected by DeepSpeed's launcher
    args = parser.parse_args()

    world = world_from_environment()
    world_size = world.world_size if args.world_size is None else args.world_size
    check_arguments(args, world_size)
    config = Config.load(args.config, args.set, world_size, needs_data=args.measure)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found nothing else
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.WARNING)

    from trainer.memory import parse_bytes  # slow to import, for DeepSpeed
    from trainer.meters import peak_flops
    from trainer.run_plan import compared, make_plan, report

    gpu_memory = parse_bytes("--gpu-memory", args.gpu_memory)
    peak = args.peak_tflops * 1e12 if args.peak_tflops else peak_flops("H100", config.train.bf16)
    text = report(make_plan(config, world_size), gpu_memory, args.mfu, peak) if world.is_main else ""
    if not args.measure:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, and is no error
    if world.is_main:
        print(text, flush=True)
    if args.measure:
        from trainer.measure import measure

        config = Config.load(args.config, args.set)
        with distributed(world):
            log.setLevel(logging.WARNING)
            measured = measure(config, world)
        if world.is_main:
            print("\n" + compared(make_plan(config, world.world_size), measured))


def check_arguments(args: argparse.Namespace, world_size: int) -> None:
    """Raises ConfigError for a number that cannot be meant."""
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size}: must be at least 1")
    if not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu {args.mfu}: a share of the peak, expected above 0 and at most 1, as 0.4")
    if args.peak_tflops is not None and not 0 < args.peak_tflops < math.inf:
        raise ConfigError(f"--peak-tflops {args.peak_tflops}: must be above 0, as 989")


if __name__ == "__main__":
    run_main(main)
