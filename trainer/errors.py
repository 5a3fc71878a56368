"""What a user can mend: each error says what was found, what was expected, where, and the way out.

Entry points print the message without a traceback and leave with `EXIT_USER_ERROR`.
"""

import os
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A mistake outside this code, with a message for the person who can mend it."""


class ConfigError(UserError):
    """A setting, or several settings together, that cannot work."""


class DataError(UserError):
    """A shard, sample or source file that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint or model folder that cannot be used."""


def run_main(main: Callable[[], None]) -> None:
    """Runs an entry point: user errors become one message and exit code 2, everything else keeps its traceback."""
    try:
        main()
    except UserError as error:
        # Configurations and folders are the same for all ranks, so one rank says it; a bad sample is one rank's own.
        if isinstance(error, DataError) or os.environ.get("RANK", "0") == "0":
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
