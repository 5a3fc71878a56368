"""What is found out about a tar once, and kept: arrays in a file beside it, or else in a cache folder.

Each has a stamp of what it was made from, and is not believed under another one.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

import numpy as np

from trainer.errors import DataError
from trainer.urls import shown


def load_kept(place: Path | str, kind: str, stamp: list[int], names: Iterable[str]) -> dict[str, np.ndarray]:
    """The named arrays that `save_kept` has kept for a tar under a stamp that begins so; empty if there are none."""
    for file in kept_files(place, kind):
        try:
            with np.load(file, allow_pickle=False) as stored:
                if stored["stamp"].tolist()[: len(stamp)] == stamp:
                    return {name: stored[name] for name in names}
        except Exception:  # absent, or damaged: numpy and zipfile answer to that with many classes
            continue
    return {}


def save_kept(place: Path | str, kind: str, stamp: list[int], arrays: dict[str, np.ndarray]) -> None:
    """Keeps arrays beside a tar or, where that cannot be written (or the tar is at a URL), in the cache folder.

    Raises DataError where neither can be: every process would have to make them anew, again and again.
    """
    failures = []
    for file in kept_files(place, kind):
        partial_file = file.with_name(f".{file.name}.{uuid4().hex}.tmp.npz")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                np.savez(partial_file, stamp=np.array(stamp), **arrays)  # type: ignore[arg-type]
                partial_file.replace(file)
                return
            finally:
                partial_file.unlink(missing_ok=True)
        except OSError as error:
            failures.append(f"{file.parent} ({error.strerror or error})")
    raise DataError(
        f"{shown(str(place))}: its {kind.partition('-')[0]} cannot be kept: neither in {' nor in '.join(failures)} can "
        f"be written; make room, or name a folder in XDG_CACHE_HOME"
    )


def cache_folder() -> Path:
    """Where this user's caches are kept: XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "mqwen-trainer"


def kept_files(place: Path | str, kind: str) -> list[Path]:
    """Where arrays of a kind are kept for a tar (a path or a URL), in the order in which they are looked for."""
    if isinstance(place, str):
        name = hashlib.sha256(place.encode()).hexdigest()[:16]
        return [cache_folder() / "index" / f"url-{name}.{kind}.npz"]
    name = hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:16]
    cached = cache_folder() / "index" / f"{place.stem}-{name}.{kind}.npz"
    return [place.with_name(f"{place.name}.{kind}.npz"), cached]
