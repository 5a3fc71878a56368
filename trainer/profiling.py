"""A profile of a run's first steps: a trace of each rank, which Perfetto opens, and where the time went."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from trainer.dist import log
from trainer.metrics import PARTS

BEFORE = 2
"""Steps that come before the profiled ones: in the first, memory is allocated and kernels are chosen."""


@contextmanager
def profiled(steps: int, folder: Path, rank: int) -> Iterator[Callable[[dict], None]]:
    """Profiles so many steps, the third of this process and those after it, into `folder`; 0: none.

    Gives what is to be called with each step's line.
    """
    if not steps:
        yield lambda line: None
        return
    lines: list[dict] = []

    def finish(found: Any) -> None:
        measured = lines[BEFORE:]
        if not measured:
            log.warning("no profile: the run has ended before its third step")
            return
        if len(measured) < steps:
            log.warning("a profile of %d step(s), not %d: the run has ended", len(measured), steps)
        folder.mkdir(parents=True, exist_ok=True)
        trace = folder / f"steps-{measured[0]['step']:06d}-{measured[-1]['step']:06d}-rank{rank}.json.gz"
        found.export_chrome_trace(str(trace))
        log.info("%s", summary(measured, communication_seconds(found)))
        log.info("trace, for ui.perfetto.dev: %s", trace)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    plan = schedule(wait=BEFORE - 1, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=finish) as profiler:

        def note(line: dict) -> None:
            lines.append(line)
            profiler.step()

        yield note


def communication_seconds(found: Any) -> float:
    """Of NCCL's kernels, or of Gloo's operations; on a GPU they run beside others."""
    seconds = 0.0
    for event in found.key_averages():
        if event.key.startswith("gloo:"):
            seconds += event.cpu_time_total / 1e6
        elif "nccl" in event.key.lower() and not event.is_user_annotation:  # which names kernels that are there too
            seconds += event.self_device_time_total / 1e6
    return seconds


def summary(lines: list[dict], communication: float) -> str:
    """What a step's time went into, a line each. communication: seconds of all these steps."""
    total = sum(line["step_time"] for line in lines)
    parts = {part: sum(line[f"{part}_time"] for line in lines) for part in PARTS}
    rows = [f"  {part:14}{seconds / total:6.1%}" for part, seconds in parts.items()]
    rows.append(f"  {'the rest':14}{1 - sum(parts.values()) / total:6.1%}")
    rows.append(f"  {'communication':14}{communication / total:6.1%} (within these)")
    steps = f"steps {lines[0]['step']} to {lines[-1]['step']}"
    return "\n".join([f"profile of {steps}, {total / len(lines):.3g} s each:", *rows])
