"""What every source is, and what all of them need: keys, names of entries, and a source's fingerprint."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.errors import BadSample, DataError

MALFORMED_ENTRY = "malformed entry"
NO_CAPTION = "no caption"

Members = dict[str, bytes | str | dict]
"""Content by extension, as `ShardFile.write` takes it."""


@dataclass
class SourceRecord:
    """One sample of a source: a unique key, and its members by extension."""

    key: str
    members: Members


class Source(Protocol):
    """A data set that becomes shards. An entry's record depends on its number alone."""

    def __len__(self) -> int:
        """Entries, good and bad."""

    def record(self, number: int) -> SourceRecord:
        """The checked sample of one entry. Raises BadSample, which names the entry and says what is wrong."""

    def fingerprint(self) -> dict[str, Any]:
        """What changes, and is cheap to find out, when the source does; to be stored as JSON."""


def make_key(number: int, name: str = "") -> str:
    """A key that no other entry has, that says which entry it is, and that is fit for a tar."""
    clean = re.sub(r"[^0-9A-Za-z_-]+", "_", name)[:80]
    return f"{number:08d}-{clean}" if clean else f"{number:08d}"


@contextmanager
def naming(entry: str) -> Iterator[None]:
    """Puts the name of the entry before what is wrong with it."""
    try:
        yield
    except BadSample as error:
        raise BadSample(f"{entry}: {error}", error.kind) from error


def entry_name(number: int, name: Any) -> str:
    """An entry's id as a text that can be stored. Raises BadSample if it cannot."""
    text = str(name)
    if re.search("[\ud800-\udfff]", text):
        raise BadSample(f"entry {number}: half a character (a lone surrogate) in the id {text!r}", MALFORMED_ENTRY)
    return text


def file_fingerprint(file: Path) -> dict[str, Any]:
    """Path, and hash of the content. Raises DataError if there is no such file."""
    try:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return {"file": str(file.resolve()), "sha256": digest}
