"""How much of the processor there is for this process."""

import os


def cores() -> int:
    """Cores that this process may use: of a Slurm allocation only those that are ours; not every system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
