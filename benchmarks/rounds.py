"""Arms of a comparison, run by turns in processes of their own, and what they measured."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

PROGRAM = Path(__file__).with_name("arms.py")

LOSS_TOLERANCE = 1e-3
NORM_TOLERANCE = 1e-2
"""Relative, between arms, of a step's loss and of its gradient norm. CLIP's own processor makes pixels that differ by a
level in 255 here and there; in bf16 rounding differs too."""


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

    def train(self, steps: int) -> dict[str, Any]:
        """Trains so many steps; what they took. Leaves with the arm's own words where it has ended."""
        assert self.process
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):
                return json.loads(line)
        self.log.seek(0)
        sys.exit(f"arm '{self.name}' has ended:\n{self.log.read()[-4000:]}")

    def stop(self) -> None:
        """Ends its process, if it has one."""
        if self.process is not None:
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
    names: list[str], config: Path, warm_up: int, rounds: int, steps: int, by_turns: bool = True
) -> dict[str, Arm]:
    """Runs the arms over the same steps. Leaves where their losses or gradient norms differ.

    by_turns: a round of each after another, for timings that a busy machine disturbs; else one arm after another, for
    memory that does not hold them all.
    """
    arms = {name: Arm(name, config) for name in names}
    try:
        with tqdm(total=len(arms) * (rounds + 1), desc=config.stem, unit="round", disable=None) as bar:
            first = []
            for arm in arms.values():  # one after the other, lest all load at once
                arm.start()
                first.append(arm.train(warm_up)["steps"])
                bar.update()
                if not by_turns:
                    arm.rounds += [arm.train(steps) for _ in range(rounds)]
                    bar.update(rounds)
                    arm.stop()
            gate(names, first)
            for _ in range(rounds if by_turns else 0):
                for arm in arms.values():
                    arm.rounds.append(arm.train(steps))
                    bar.update()
            gate(names, [arm.steps for arm in arms.values()])
    finally:
        for arm in arms.values():
            arm.stop()  # also where one has failed
    return arms


def gate(names: list[str], steps: list[list[dict[str, Any]]]) -> None:
    """Leaves, naming arm and step, where not all arms have the last one's losses and gradient norms."""
    for name, of_arm in zip(names, steps, strict=True):
        for number, (found, expected) in enumerate(zip(of_arm, steps[-1], strict=True), start=1):
            for what, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
                if not abs(found[what] - expected[what]) <= tolerance * abs(expected[what]):  # NaN is not either
                    sys.exit(f"step {number}: {what} of '{name}' is {found[what]}, of '{names[-1]}' {expected[what]}: "
                             "the arms do not train the same")  # fmt: skip


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
