"""What a person is told, on a terminal that obeys whatever it is sent."""

import os
import signal
import subprocess
import sys

import pytest

from trainer import stopping
from trainer.errors import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    ConfigError,
    DataError,
    HostError,
    UserError,
    printable,
    run_main,
)
from trainer.stopping import StopRequest

HOSTILE = "a\x1b[2J\x9b1m\u202egnp\u200b\u2066\x7f\r\ud800 b"
WRITTEN_OUT = r"a\x1b[2J\x9b1m\u202egnp\u200b\u2066\x7f\r\ud800 b"


def test_what_a_terminal_obeys_hides_or_turns_round_is_written_out():
    assert printable(HOSTILE) == WRITTEN_OUT
    for harmless in ("a picture: 'x' <b>", "球场上，一个女人", "هذه صورة", "😀é"):
        assert printable(harmless) == harmless
    assert printable("one\ntwo\t") == r"one\ntwo\t"
    assert printable("one\ntwo\t", lines=True) == "one\ntwo\\t"


def test_an_error_reaches_the_terminal_printable_and_keeps_its_lines(capsys):
    def main() -> None:
        raise DataError(f"shard.tar: member {HOSTILE} comes twice\n  second line")

    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == EXIT_USER_ERROR
    assert capsys.readouterr().err == f"\nerror: shard.tar: member {WRITTEN_OUT} comes twice\n  second line\n"


@pytest.mark.parametrize(
    ("error", "rank", "local_rank", "told"),
    [
        (ConfigError("wrong"), "0", "0", "error: wrong"),
        (ConfigError("wrong"), "1", "1", ""),  # rank 0 of its host has the same files and settings
        (ConfigError("wrong"), "8", "0", "error: rank 8 on host n2: wrong"),  # a host with files of its own
        (ConfigError("wrong", on_all_ranks=True), "8", "0", ""),
        (DataError("bad shard"), "9", "1", "error: rank 9 on host n2: bad shard"),
        (DataError("bad shard", on_all_ranks=True), "0", "0", "error: bad shard"),
        (HostError("rank 9 on host n2 is lost"), "9", "1", "error: rank 9 on host n2 is lost"),
    ],
)
def test_an_error_is_told_once_by_a_rank_that_has_it(monkeypatch, capsys, error: UserError, rank, local_rank, told):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr("socket.gethostname", lambda: "n2")

    def main() -> None:
        raise error

    with pytest.raises(SystemExit):
        run_main(main)
    assert capsys.readouterr().err.strip() == told


def test_ctrl_c_is_a_line_and_its_own_code(capsys):
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "\nstopped by Ctrl-C\n"


def test_a_second_ctrl_c_is_heard_only_from_a_patient_person_who_was_told_what_it_does(monkeypatch, capfd):
    monkeypatch.setattr(stopping, "PATIENCE_SECONDS", 1e9)
    monkeypatch.delenv("RANK", raising=False)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(stopping, "PATIENCE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == "\nending with a checkpoint; Ctrl-C again ends at once, without one\n"


CLOSED = """
import os, signal
from trainer.stopping import StopRequest
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 2)
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGINT)
print(stop.signal)
"""


def test_ctrl_c_is_heard_where_nobody_reads_the_errors_any_more():
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", CLOSED], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "SIGINT\n"


SAY = "from trainer.errors import run_main; run_main(lambda: print('\\u56fe'))"


@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({"PYTHONIOENCODING": "ascii"}, 0, "\\u56fe\n"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, EXIT_USER_ERROR, "export LC_ALL=C.UTF-8"),
    ],
)
def test_an_environment_without_utf_8_loses_no_word_and_no_file(variables, code, said):
    done = subprocess.run(
        [sys.executable, "-c", SAY], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert said in done.stdout + done.stderr
