"""A forked child that stands still before its first line is replaced; see `trainer.data.fork`."""

import subprocess
import sys

import pytest

SCRIPT = """
import logging, os, time
from trainer.data import fork
from trainer.data.parallel import in_processes

logging.basicConfig(format="%(message)s")
fork.START_SECONDS = 1.0
still = {still}
forks = []

def before():
    forks.append(os.getpid())

def in_child():
    if len(forks) <= still:
        time.sleep(1000)  # where the interpreter's own lock would hold the child

os.register_at_fork(before=before, after_in_child=in_child)
print(sorted(in_processes(str, [1, 2, 3, 4], "numbers", 2)), len(forks))
"""


@pytest.mark.parametrize(("still", "forked"), [(0, 2), (1, 3), (3, 5)])
def test_a_child_that_stands_still_is_ended_and_forked_again(still, forked):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(still=still)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["['1',", "'2',", "'3',", "'4']", str(forked)]
    assert done.stderr.count("stands still") == still


def test_when_none_starts_it_is_an_error_and_nothing_is_left():
    script = SCRIPT.format(still=100).replace("= 1.0", "= 0.1")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "10 forked processes in a row did not start" in done.stderr
    assert not subprocess.run(["pgrep", "-f", "still = 100"], capture_output=True, text=True, check=False).stdout
