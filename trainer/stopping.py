"""Asked to stop: a signal sets a flag, all ranks agree on it at the next micro-step, and the run ends with a save.

SIGTERM comes from a preempting scheduler, SIGUSR1 ahead of a time limit, SIGINT from Ctrl-C, SIGHUP from a terminal
that is closed (unless `nohup` has it ignored). Handlers only set the flag, and may say so: the process may be anywhere,
in a collective too.
"""

import os
import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and has saved all: start it again to go on. (EX_TEMPFAIL of sysexits.h)"""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

PATIENCE_SECONDS = 2.0
"""A second Ctrl-C that comes sooner is not meant."""


class Stopped(Exception):
    """All ranks have agreed to stop."""


class StopRequest:
    """Whether this process was asked to stop. As a context it catches the signals; a second Ctrl-C, `PATIENCE_SECONDS`
    or more after the first, ends at once."""

    def __init__(self) -> None:
        self.signal = ""
        """Name of the first that came; empty if none has."""
        self._since = 0.0
        self._is_alone = "RANK" not in os.environ  # else a launcher is between the person and this process

    def __bool__(self) -> bool:
        return bool(self.signal)

    def __enter__(self) -> "StopRequest":
        unheard = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        caught = [number for number in SIGNALS if not (number == signal.SIGHUP and unheard)]
        self._before = {number: signal.signal(number, self._handle) for number in caught}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # When the first rank has left, srun and other launchers end the rest by a signal: each is to leave with its
            # own message and code.
            ends_early = error is not None and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ends_early else handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            if time.monotonic() - self._since < PATIENCE_SECONDS:
                return  # an impatient finger, or the terminal and a launcher both
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._since = signal.Signals(number).name, time.monotonic()
            if number == signal.SIGINT and self._is_alone:
                with suppress(OSError):  # who was to read it may have ended by the same Ctrl-C
                    os.write(2, b"\nending with a checkpoint; Ctrl-C again ends at once, without one\n")


def ignore_in_worker() -> None:
    """For a data-loading process: those who signal a whole group would end it before the run has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
