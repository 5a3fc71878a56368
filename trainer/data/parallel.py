"""The same task for many items, on all cores."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from tqdm import tqdm

from trainer.cores import cores
from trainer.data.fork import LiveForkContext
from trainer.errors import DataError

_task: Callable[[Any], Any]


def in_processes(
    task: Callable[[Any], Any], items: Sequence[Any], what: str, workers: int | None = None
) -> Iterator[Any]:
    """`map(task, items)` in so many processes (default: one a core), with a progress bar on a terminal.

    what: is being done, for the bar and for messages. The processes end with this one, however it ends. Raises what
    the task raises, and DataError where a process is killed.
    """
    if not items:
        return
    workers, bar = min(len(items), workers or cores()), partial(tqdm, desc=what, total=len(items), disable=None)
    if workers <= 1:
        yield from bar(map(task, items))
        return
    alive, parent = os.pipe()
    # Forked, the processes find the task in memory, with whatever it holds: tokenizers need not travel.
    pool = ProcessPoolExecutor(workers, LiveForkContext(), _start_worker, (task, alive, parent))
    finished = False
    try:
        yield from bar(pool.map(_run_task, items))
        finished = True
    except BrokenProcessPool as error:
        raise DataError(
            f"{what}: a worker process was killed, as happens when memory runs out; start again with more memory or "
            f"fewer processes (cores, --workers)"
        ) from error
    finally:
        if not finished:
            os.close(parent)  # nobody waits for what the others are at
        pool.shutdown(cancel_futures=True)
        if finished:
            os.close(parent)
        os.close(alive)


def _start_worker(task: Callable[[Any], Any], alive: int, parent: int) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others
    os.close(parent)
    # Nobody ever writes: the read ends when the parent closes its end or is killed. Without it the workers of a killed
    # run would stay, and wait for work for ever.
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)
    os._exit(1)


def _run_task(item: Any) -> Any:
    return _task(item)
