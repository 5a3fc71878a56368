"""What a person is told, on a terminal that obeys whatever it is sent."""

import pytest

from trainer.errors import EXIT_USER_ERROR, DataError, printable, run_main

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
