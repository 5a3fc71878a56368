"""Forked processes that are known to live.

In CPython before 3.11.8 a forked child may stand still before its first line of Python: another thread of the parent, a
collective's for one, was in the interpreter's list of threads at that moment, and the child waits for ever for it to
come out (python/cpython#112275). Here such a child is ended, and forked again.
"""

import logging
import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen

log = logging.getLogger("trainer")

START_SECONDS = 10.0
"""A child that says nothing for so long stands still; others take milliseconds."""

ATTEMPTS = 10
"""One in a few hundred stands still."""


class _LiveProcess(ForkProcess):
    """Says that it lives, and waits to hear that it is wanted: so it holds nothing when it is ended instead."""

    _line: tuple[Connection, Connection]
    """The parent's end and the child's."""

    @staticmethod
    def _Popen(process: "_LiveProcess") -> Popen:
        for _ in range(ATTEMPTS):
            ours, theirs = process._line = multiprocessing.Pipe()
            started = Popen(process)
            theirs.close()
            with ours:
                if ours.poll(START_SECONDS):
                    ours.send_bytes(b"go on")
                    return started
            log.warning("a forked process stands still, as it may before Python 3.11.8: ended, and forked again")
            started.kill()
            started.wait()
        raise RuntimeError(f"{ATTEMPTS} forked processes in a row did not start within {START_SECONDS:.0f} s each")

    def run(self) -> None:
        ours, theirs = self._line
        ours.close()  # or the end of the parent would not be heard
        with theirs:
            theirs.send_bytes(b"here")
            theirs.recv_bytes()
        super().run()


class LiveForkContext(ForkContext):
    """`multiprocessing.get_context("fork")`, whose processes live once `start` returns."""

    Process = _LiveProcess  # type: ignore[assignment]
