"""The entries of a JSON list, or of JSON lines, parsed one at a time when they are asked for.

Memory holds where each entry lies, not what is in it: the 665 thousand conversations of LLaVA-1.5 take 1 GB as text and
more as objects, and worker processes would copy objects once more by merely counting references to them.
"""

import json
import mmap
import re
from array import array
from pathlib import Path
from typing import Any

from trainer.data.sources.source import MALFORMED_ENTRY, file_fingerprint
from trainer.errors import BadSample, DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK = re.compile(r"[ \t\r\n]*")


class JsonEntries:
    """A sequence of parsed entries. Which of the two forms a file has is seen from its first character.

    Raises DataError if the file cannot be read, or is neither; BadSample where a single line is not JSON.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            with file.open("rb") as opened:
                self._text = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise DataError(f"{file}: the file is empty") from error
        start = len(_BYTE_ORDER_MARK) if self._text[:3] == _BYTE_ORDER_MARK else 0
        first = self._text[start : start + 4096].lstrip()[:1]
        self._starts, self._ends = array("q"), array("q")
        if first == b"{" and (file.suffix in (".jsonl", ".ndjson") or self._is_lines(start)):
            self._find_lines(start)
        else:
            self._find_list(start)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Any:
        try:
            return json.loads(self._text[self._starts[number] : self._ends[number]].decode())
        except (ValueError, RecursionError) as error:
            line = self._text[: self._starts[number]].count(b"\n") + 1
            what = f"entry {number}, line {line} of {self.file}: not JSON ({_reason(error)})"
            raise BadSample(what, MALFORMED_ENTRY) from error

    def fingerprint(self) -> dict[str, Any]:
        return file_fingerprint(self.file)

    def _is_lines(self, start: int) -> bool:
        """Whether the first line that is not blank is an object by itself."""
        self._text.seek(start)
        line = next(line for line in iter(self._text.readline, b"") if line.strip())
        try:
            return isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            return False

    def _find_lines(self, start: int) -> None:
        while start < len(self._text):
            end = self._text.find(b"\n", start)
            end = len(self._text) if end < 0 else end
            if self._text[start:end].strip():
                self._starts.append(start)
                self._ends.append(end)
            start = end + 1

    def _find_list(self, start: int) -> None:
        """Walks over the entries of `[a, b, ...]`, parsing each once and keeping none."""
        scan = json.JSONDecoder().raw_decode
        try:
            text = self._text[start:].decode()
            place = _BLANK.match(text, 0).end()  # type: ignore[union-attr]  # it matches everywhere
            if text[place : place + 1] != "[":
                found = type(json.loads(text)).__name__
                raise DataError(f"{self.file}: expected a JSON list or one JSON object a line, found {found}")
            place = _BLANK.match(text, place + 1).end()  # type: ignore[union-attr]
            done, bytes_done = 0, start
            while text[place : place + 1] != "]" or self._starts:  # past a comma, "]" is an error of the file
                entry = place
                _, place = scan(text, entry)
                # Characters are counted where bytes are needed; in ASCII they are the same, elsewhere this is exact.
                bytes_done += len(text[done:entry].encode())
                self._starts.append(bytes_done)
                bytes_done += len(text[entry:place].encode())
                self._ends.append(bytes_done)
                done = place
                place = _BLANK.match(text, place).end()  # type: ignore[union-attr]
                if text[place : place + 1] == "]":
                    break
                if text[place : place + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
                place = _BLANK.match(text, place + 1).end()  # type: ignore[union-attr]
            if text[place + 1 :].strip():
                raise json.JSONDecodeError("Extra data", text, place + 1)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.file}: not JSON ({_reason(error)})") from error
        if not self._starts:
            raise DataError(f"{self.file}: the list is empty")


def read_json(file: Path) -> Any:
    """A JSON file, whole. Raises DataError if it cannot be read or is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
