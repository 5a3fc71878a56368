"""Data sets as people have them -> samples for the writer."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.conversation import ROLES, parse_conversation
from trainer.data.index import IMAGE_EXTENSIONS
from trainer.data.transform import decode
from trainer.errors import DataError


@dataclass
class SourceRecord:
    """One sample of a source: a unique key, and its members by extension."""

    key: str
    members: dict[str, bytes | str | dict]


def read_llava(file: Path) -> list[dict[str, Any]]:
    """The entries of a LLaVA JSON file: a list of objects with `conversations`, and `image` if they have a picture.

    Raises DataError, naming the file, if it is anything else; single entries are checked by `llava_records`.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{file}: expected LLaVA's JSON, a list of samples, found {type(entries).__name__}")
    if not any(isinstance(entry, dict) and isinstance(entry.get("conversations"), list) for entry in entries):
        raise DataError(f"{file}: entry 0: {_not_llava(entries[0])}")
    return entries


def llava_records(
    entries: list[dict[str, Any]], images: Path, skipped: list[str] | None = None
) -> Iterator[SourceRecord]:
    """Checked records of LLaVA entries, pictures taken from the folder `images`.

    A bad entry raises DataError; given a list `skipped`, it is noted there and left out.
    """
    for number, entry in enumerate(entries):
        name = str(entry.get("id", number)) if isinstance(entry, dict) else str(number)
        try:
            yield _llava_record(number, name, entry, images)
        except DataError as error:
            if skipped is None:
                raise DataError(f"entry {number} (id {name!r}): {error}; --skip-bad leaves such entries out") from error
            skipped.append(f"entry {number} (id {name!r}): {error}")


def _llava_record(number: int, name: str, entry: Any, images: Path) -> SourceRecord:
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise DataError(_not_llava(entry))
    files = entry.get("image") or []
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise DataError("'image' must be a file name or a list of file names")
    turns = parse_conversation({"conversations": entry["conversations"]}, len(files), caption_prompt="")
    members: dict[str, bytes | str | dict] = {}
    for position, file in enumerate(files):
        extension = Path(file).suffix.lstrip(".").lower()
        members[extension if len(files) == 1 else f"{position}.{extension}"] = read_picture(images / file)
    speakers = {role: name for name, role in ROLES.items() if name in ("human", "gpt", "system")}
    conversation = [{"from": speakers[turn.role], "value": turn.text} for turn in turns]
    members["json"] = {"id": name, "conversations": conversation}
    return SourceRecord(f"{number:08d}-{re.sub(r'[^0-9A-Za-z_-]+', '_', name)[:80]}", members)


def _not_llava(entry: Any) -> str:
    found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
    return f"expected LLaVA's fields 'conversations' and 'image', found {found}"


def read_picture(file: Path) -> bytes:
    """The bytes of a picture that can be decoded, in a format shards know. Raises DataError naming the file."""
    if file.suffix.lstrip(".").lower() not in IMAGE_EXTENSIONS:
        raise DataError(f"{file}: shards hold pictures as {', '.join(IMAGE_EXTENSIONS)}")
    try:
        content = file.read_bytes()
        decode(content)
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such picture") from error
    except (OSError, ValueError, DataError) as error:
        raise DataError(f"{file}: {error}") from error
    return content
