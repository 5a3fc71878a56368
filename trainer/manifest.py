"""What belongs to a checkpoint: manifest.json lists its files, each with bytes and SHA-256."""

import hashlib
import json
from pathlib import Path

from trainer.errors import CheckpointError

MANIFEST = "manifest.json"

Entries = dict[str, tuple[int, str]]
"""Path within the checkpoint -> (bytes, SHA-256 in hexadecimal)."""


def file_hash(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write(folder: Path, entries: Entries) -> None:
    """Lists the files of a checkpoint, one a line."""
    (folder / MANIFEST).write_text(json.dumps({name: entries[name] for name in sorted(entries)}, indent=1) + "\n")


def read(folder: Path) -> Entries:
    """The files of a checkpoint. Raises CheckpointError if they are not listed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not manifest or not isinstance(manifest, dict):
            raise ValueError("it lists no file")
        return {name: (int(size), str(digest)) for name, (size, digest) in manifest.items()}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: not a whole checkpoint: its {MANIFEST} cannot be read ({error})") from error


def check_whole(folder: Path, within: str = "") -> None:
    """Raises CheckpointError, naming the file, where a checkpoint is not what its manifest says, byte for byte.

    within: looks at the files of this folder in it alone.
    """
    for name, (size, digest) in read(folder).items():
        if not name.startswith(within):
            continue
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise CheckpointError(f"{folder}: not whole: {name} should have {size} bytes, found {found}")
        if file_hash(file) != digest:
            raise CheckpointError(f"{folder}: not whole: {name} has other bytes than were written")
