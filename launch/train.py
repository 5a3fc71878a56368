"""Trains one stage.

    deepspeed launch/train.py --config stage1.yaml [--set section.key=value ...] [--resume auto|none|PATH]
        [--profile STEPS]

On one process, without a launcher: python launch/train.py --config stage1.yaml
"""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from trainer.config import Config
from trainer.errors import run_main
from trainer.paths import find_config
from trainer.run_lock import RunLock, run_lock
from trainer.stopping import EXIT_STOPPED, Stopped, StopRequest

LOOK_SECONDS = 1.0
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that this process gets when its parent has ended."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one in launch/configs/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides of the YAML"
    )
    parser.add_argument("--resume", default="auto", help="auto (the default), none, or a checkpoint folder")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="STEPS", help="write a trace of so many steps, from the third on"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # injected by DeepSpeed's launcher
    args = parser.parse_args()
    if args.profile < 0:
        parser.error(f"--profile {args.profile}: expected a number of steps")

    try:
        with StopRequest() as stop:
            run(args, stop)
    except Stopped:
        sys.exit(EXIT_STOPPED)


def run(args: argparse.Namespace, stop: StopRequest) -> None:
    """The job, from the environment to the last checkpoint. Raises Stopped where it was asked to end before."""
    from trainer.dist import distributed, log, on_main_rank, world_from_environment  # slow to import: signals first

    world = world_from_environment()
    config = Config.load(args.config, args.set, world.world_size)
    if args.local_rank is not None:
        stop_with_launcher()

    from trainer.preflight import preflight  # slow too, so after the configuration is known good
    from trainer.setup import check_writable, setup
    from trainer.train import train

    with distributed(world, stop), ExitStack() as stack:
        lock: list[RunLock] = []

        def take_folder() -> None:
            check_writable(Path(config.run.output_dir))
            lock.append(stack.enter_context(run_lock(Path(config.run.output_dir))))

        log.info("%s -> %s", find_config(args.config), config.run.output_dir)
        on_main_rank(world, take_folder)
        preflight(config, world)
        state = setup(config, world, args.resume, stop)
        state.lock = lock[0] if lock else None
        try:
            if state.step < state.last_step or state.evaluation_due:
                train(state, profile_steps=args.profile)
            else:
                log.info("%s is finished: step %d of %d", config.run.output_dir, state.step, state.last_step)
                if args.profile:
                    log.warning("no profile: there are no steps left")
        finally:
            state.engine.destroy()


def stop_with_launcher() -> None:
    """A launcher that is killed leaves its ranks behind, and nobody would know of them: let them save and end.

    DeepSpeed's is two processes: the command that was typed, and the parent of the ranks, which outlives it.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)  # it was gone before
    with contextlib.suppress(psutil.Error):
        command = psutil.Process(parent).parent()
        if command and any("deepspeed" in word for word in command.cmdline()):
            threading.Thread(target=_stop_with_command, args=(parent, command.pid), daemon=True).start()


def _stop_with_command(launcher: int, command: int) -> None:
    with contextlib.suppress(psutil.Error):
        while psutil.Process(launcher).ppid() == command:
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    run_main(main)
