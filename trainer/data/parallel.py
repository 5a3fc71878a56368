"""The same task for many items, on all cores."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

_task: Callable[[Any], Any]


def in_processes(task: Callable[[Any], Any], items: Sequence[Any], what: str) -> Iterator[Any]:
    """`map(task, items)` over the cores, with a progress bar (none where the output is not a terminal)."""
    global _task
    workers, bar = min(len(items), os.cpu_count() or 1), partial(tqdm, desc=what, total=len(items), disable=None)
    if workers <= 1:
        yield from bar(map(task, items))
        return
    # Forked, the processes find the task in memory, with whatever it holds: tokenizers need not travel.
    _task = task
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        yield from bar(pool.map(_run_task, items))


def _run_task(item: Any) -> Any:
    return _task(item)
