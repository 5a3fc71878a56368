"""Runs the project's commands as a user does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command(*args: str, timeout: float = 600, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the repository, with this Python's folder first on the path. Its output is kept.

    variables: of the environment, beside this process's own.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **variables}
    return subprocess.run(args, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher(ranks: int) -> list[str]:
    """The words of `deepspeed launch/train.py` on so many ranks, beside other such jobs."""
    return ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), "launch/train.py"]


def deepspeed(*args: str, ranks: int = 2, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """`deepspeed launch/train.py` on so many ranks; fails the test, with the output, if it fails."""
    done = command(*launcher(ranks), *args, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done
