"""Trains one stage.

    deepspeed launch/train.py --config stage1.yaml [--set section.key=value ...] [--resume auto|none|PATH]

On one process, without a launcher: python launch/train.py --config stage1.yaml
"""

import argparse

from trainer.config import Config
from trainer.dist import distributed, log, world_from_environment
from trainer.errors import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one in launch/configs/")
    parser.add_argument(
        "--set", nargs="+", action="append", default=[], metavar="KEY=VALUE", help="overrides of the YAML"
    )
    parser.add_argument("--resume", default="auto", help="auto (the default), none, or a checkpoint folder")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # injected by DeepSpeed's launcher
    args = parser.parse_args()

    world = world_from_environment()
    overrides = [override for group in args.set for override in group]
    config = Config.load(args.config, overrides, world.world_size)

    from trainer.train import setup, train  # slow to import, so after the configuration is known to be good

    with distributed(world):
        state = setup(config, world, args.resume)
        try:
            if state.step < state.last_step:
                train(state)
            else:
                log.info("%s is finished: step %d of %d", config.run.output_dir, state.step, state.last_step)
        finally:
            state.engine.destroy()


if __name__ == "__main__":
    run_main(main)
