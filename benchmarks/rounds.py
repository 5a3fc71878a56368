"""Arms of a comparison, run by turns in processes of their own, and what they measured."""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

PROGRAM = Path(__file__).with_name("arms.py")

LOSS_TOLERANCE = 1e-3
NORM_TOLERANCE = 1e-2
"""Relative, between arms, of a step's loss and of its gradient norm. CLIP's own processor makes pixels that differ by a
level in 255 here and there; in bf16 rounding differs too."""


NAMES = {
    "notes": "the notes' way: HF Trainer",
    "hf": "HF Trainer, tuned, ZeRO-2",
    "hf-kept": "the same, activations kept",
    "pytorch": "plain PyTorch loop, our model",
    "ours": "this trainer",
}
"""Of arms, in tables."""


class ArmError(Exception):
    """An arm has ended."""


class OutOfTimeError(ArmError):
    """An arm takes too long."""


@dataclass
class Arm:
    """One arm: its process, and a record for each round."""

    name: str
    config: Path
    rounds: list[dict[str, Any]] = field(default_factory=list)
    process: subprocess.Popen | None = None

    def start(self) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `stop`)
        environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), self.name, str(self.config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True, env=environment,
        )  # fmt: skip

    def train(self, steps: int, ends: float) -> dict[str, Any]:
        """Trains so many steps; what they took. Raises ArmError, with the arm's own words, where it ends, and
        OutOfTimeError where it is not done when the monotonic clock says `ends`."""
        assert self.process
        assert self.process.stdin
        assert self.process.stdout
        timer = threading.Timer(min(threading.TIMEOUT_MAX, max(0.0, ends - time.monotonic())), self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith('{"seconds"'):
                    return json.loads(line)
        except BrokenPipeError:
            pass  # it has ended
        finally:
            timer.cancel()
        if time.monotonic() > ends:
            raise OutOfTimeError(f"arm '{self.name}' was not done in time")
        self.log.seek(0)
        raise ArmError(f"arm '{self.name}' has ended:\n{self.log.read()[-4000:]}")

    def stop(self) -> None:
        """Ends its process, if it has one: by itself, with its workers, or soon by force."""
        if self.process is not None:
            assert self.process.stdin
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            self.process.kill()
            self.process.wait()
            self.log.close()
            self.process = None

    @property
    def seconds(self) -> list[float]:
        """A step, of each round."""
        return [found["seconds"] / len(found["steps"]) for found in self.rounds]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [step for found in self.rounds for step in found["steps"]]


def compare(
    names: list[str], config: Path, warm_up: int, rounds: int, steps: int, ends: float = math.inf
) -> dict[str, Arm]:
    """Runs the arms over the same steps, a round of each after another, for timings that a busy machine disturbs.

    Raises as `Arm.train`.
    """
    arms = {name: Arm(name, config) for name in names}
    try:
        with tqdm(total=len(arms) * (rounds + 1), desc=config.stem, unit="round", disable=None) as bar:
            for arm in arms.values():  # one after the other, lest all load at once
                arm.start()
                arm.train(warm_up, ends)
                bar.update()
            for number in range(rounds):
                # Back and forth, lest one arm always follows the same other, whose workers are still at it.
                for arm in list(arms.values())[:: -1 if number % 2 else 1]:
                    arm.rounds.append(arm.train(steps, ends))
                    bar.update()
    finally:
        for arm in arms.values():
            arm.stop()  # also where one has failed
    return arms


def one_by_one(
    names: list[str], config: Path, warm_up: int, rounds: int, steps: int, ends: float
) -> tuple[dict[str, Arm], list[str]]:
    """The same, one arm after another, for memory that does not hold them all: the arms that were done, and what made
    others fail; for some there may not have been time. Their programs are loaded all at once."""
    arms, failures = {name: Arm(name, config) for name in names}, list[str]()
    try:
        for arm in arms.values():
            arm.start()
        for arm in tqdm(arms.values(), desc=config.stem, unit="arm", disable=None):
            try:
                arm.train(warm_up, ends)
                arm.rounds = [arm.train(steps, ends) for _ in range(rounds)]
            except OutOfTimeError:
                break
            except ArmError as error:
                failures.append(str(error))
            arm.stop()
    finally:
        for arm in arms.values():
            arm.stop()
    return {name: arm for name, arm in arms.items() if arm.rounds}, failures


def differences(arms: dict[str, Arm]) -> list[str]:
    """Where not all arms have the last one's losses and gradient norms: a line for each arm that differs, of the first
    step in which it does."""
    (*_, last), lines = arms.values(), []
    for arm in arms.values():
        for number, (found, expected) in enumerate(zip(arm.steps, last.steps, strict=True), start=1):
            differing = [
                f"{what} {found[what]} against {expected[what]}"
                for what, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE))
                if not abs(found[what] - expected[what]) <= tolerance * abs(expected[what])  # as NaN is not
            ]
            if differing:
                where = f"step {number} of '{arm.name}' and of '{last.name}'"
                lines.append(f"the arms do not train the same: {where}: {', '.join(differing)}")
                break
    return lines


def times_faster(other: Arm, ours: Arm) -> tuple[float, float, float]:
    """How many times ours is faster, round by round: median, lowest, highest."""
    ratios = [theirs / own for theirs, own in zip(other.seconds, ours.seconds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def tokens_per_second(arm: Arm, tokens: list[float]) -> float:
    """Median over the rounds. tokens: useful ones of each step, the same for all arms."""
    rates, done = [], 0
    for found in arm.rounds:
        count = len(found["steps"])
        rates.append(sum(tokens[done : done + count]) / found["seconds"])
        done += count
    return statistics.median(rates)
