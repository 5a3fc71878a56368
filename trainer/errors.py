"""What a user can mend: each error says what was found, what was expected, where, and the way out.

Entry points print the message without a traceback and leave with `EXIT_USER_ERROR`.
"""

import difflib
import io
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
"""By Ctrl-C, as shells have it."""


class UserError(Exception):
    """A mistake outside this code, with a message for the person who can mend it.

    on_all_ranks: every rank raises it, so that one of them is enough to say it.
    """

    def __init__(self, message: str, on_all_ranks: bool = False):
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


class ConfigError(UserError):
    """A setting, or several settings together, that cannot work."""


class DataError(UserError):
    """A shard, sample or source file that cannot be used."""


class BadSample(DataError):
    """One sample that cannot be used, though its shard can be read: a run notes it and goes on without it.

    kind: what is wrong, in a few words that many samples share; the message has the particulars.
    """

    def __init__(self, message: str, kind: str = "bad sample"):
        super().__init__(message)
        self.kind = kind


class HostError(UserError):
    """A host, or a way between hosts, that cannot be used: what one rank alone can know, and so has to say."""


class NumbersError(UserError):
    """Training whose numbers are no longer finite."""


class CheckpointError(UserError):
    """A checkpoint or model folder that cannot be used."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question after the known word that is nearest to an unknown one; empty if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean '{near[0]}'?" if near else ""


def refused_name(error: Exception) -> str | None:
    """What a pickle holds that PyTorch, asked for tensors alone, has refused to load; None if the error says none."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found[1] if found else None


def printable(text: str, lines: bool = False) -> str:
    """The text as a terminal may have it: what it would obey, hide or turn round is written out as in Python's repr.

    For keys, names and answers are someone else's text. lines: the line ends are the message's own, and stay.
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else repr(c)[1:-1] for c in text)


def run_main(main: Callable[[], None]) -> None:
    """Runs an entry point: user errors become one message and exit code 2, Ctrl-C a line and 130, everything else keeps
    its traceback."""
    for stream in (sys.stdout, sys.stderr):  # of a terminal that has not all characters, or of a file
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if sys.getfilesystemencoding() != "utf-8":
            raise ConfigError(
                "names of files are not UTF-8 in this environment: export LC_ALL=C.UTF-8, or PYTHONUTF8=1"
            )
        main()
    except KeyboardInterrupt:
        if _is_main():
            print("\nstopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)
    except UserError as error:
        if _is_told_here(error):
            named = _is_main() or isinstance(error, HostError)
            place = "" if named else f"rank {os.environ['RANK']} on host {socket.gethostname()}: "
            print(f"\nerror: {place}{printable(str(error), lines=True)}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_told_here(error: UserError) -> bool:
    """Whether this rank says it: rank 0 what all raise; what a rank has found alone, or may have, every rank, but what
    comes of files and settings, which the ranks of one host share, the first of each host."""
    if _is_main() or error.on_all_ranks:
        return _is_main()
    return isinstance(error, (DataError, HostError)) or os.environ.get("LOCAL_RANK", "0") == "0"
