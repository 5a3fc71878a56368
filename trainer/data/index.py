"""One index per tar: for every sample its key and, of each member, kind, offset and size.

With it a sample is read by offset, in any order, without scanning. The index lies beside its tar, or, where that folder
is read-only, in a cache folder; it is used as long as the tar's size and time of change are those it was made from.
"""

import hashlib
import os
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from trainer.errors import DataError

VERSION = 2
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("json", "txt")
BLOCK = 512
"""Bytes of a tar block; headers and data are padded to it."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where the samples of one tar lie. S samples, M members."""

    path: Path
    key_bytes: np.ndarray
    """All keys one after another, UTF-8, uint8."""
    key_ends: np.ndarray
    """(S,) int64: where each key ends in `key_bytes`."""
    member_ends: np.ndarray
    """(S,) int64: where the members of each sample end in the columns below."""
    is_image: np.ndarray
    """(M,) bool: a picture, or the text (JSON or plain)."""
    is_json: np.ndarray
    """(M,) bool."""
    offset: np.ndarray
    """(M,) int64: first byte of the member's data in the tar."""
    size: np.ndarray
    """(M,) int64: bytes."""

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, i: int) -> str:
        return self.key_bytes[self.key_ends[i - 1] if i else 0 : self.key_ends[i]].tobytes().decode(errors="replace")

    def members(self, i: int) -> slice:
        """Rows of sample `i` in the member columns."""
        return slice(self.member_ends[i - 1] if i else 0, self.member_ends[i])

    @cached_property
    def name(self) -> str:
        return self.path.name


_COLUMNS = ("key_bytes", "key_ends", "member_ends", "is_image", "is_json", "offset", "size")


def open_index(tar: Path) -> ShardIndex:
    """The index of a tar, read if it is current, made (and kept) otherwise. Raises DataError if the tar is damaged."""
    try:
        stat = tar.stat()
    except OSError as error:
        raise DataError(f"{tar}: the shard cannot be read ({error.strerror})") from error
    stamp = np.array([VERSION, stat.st_size, stat.st_mtime_ns])
    for place in _places(tar):
        try:
            with np.load(place, allow_pickle=False) as stored:
                if np.array_equal(stored["stamp"], stamp):
                    return ShardIndex(tar, **{name: stored[name] for name in _COLUMNS})
        except Exception:  # absent, or damaged: numpy and zipfile answer to that with many classes
            continue  # made anew below
    index = scan(tar)
    for place in _places(tar):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = place.with_name(f".{place.name}.{os.getpid()}.tmp.npz")
            np.savez(partial, stamp=stamp, **{name: getattr(index, name) for name in _COLUMNS})
            partial.replace(place)
            break
        except OSError:
            continue  # read-only folder: the next place, or work without a stored index
    return index


def _places(tar: Path) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mqwen-trainer" / "index"
    name = hashlib.sha256(str(tar.resolve()).encode()).hexdigest()[:16]
    return [tar.with_name(f"{tar.name}.index.npz"), cache / f"{tar.stem}-{name}.npz"]


def scan(tar: Path) -> ShardIndex:
    """Reads the headers of a tar. Members `KEY.EXT` (or `KEY.N.EXT`, ordered by N) that stand together make a sample.

    Raises DataError for a truncated or damaged tar, for a sample whose members do not stand together or come twice, and
    for one without text.
    """
    keys: list[str] = []
    names: set[str] = set()  # of the members of the last sample
    size = tar.stat().st_size
    members: list[tuple[int, int, bool, bool, int, int]] = []  # sample, N, is_image, is_json, offset, size
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                number, _, extension = extension.lower().rpartition(".")
                if not (member.isfile() and stem and dot and extension in IMAGE_EXTENSIONS + TEXT_EXTENSIONS):
                    continue
                if number and not number.isdecimal():
                    continue  # KEY.seg.png is of another use than KEY.png and KEY.0.png
                key = f"{folder}/{stem}" if folder else stem
                if not keys or keys[-1] != key:
                    keys.append(key)
                    names.clear()
                if name in names:
                    raise DataError(f"{tar}: member {member.name} comes twice; each sample needs a key of its own")
                names.add(name)
                is_image, position = extension in IMAGE_EXTENSIONS, int(number or 0)
                members.append(
                    (len(keys) - 1, position, is_image, extension == "json", member.offset_data, member.size)
                )
                end = member.offset_data + member.size
                if end > size:
                    raise DataError(f"{tar}: truncated: member {member.name} ends at byte {end}, beyond the file")
            _check_end(tar, archive.offset)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar}: not a readable tar ({error}); make the shard again") from error
    if len(set(keys)) < len(keys):
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise DataError(f"{tar}: the members of sample '{twice}' do not stand together; write them one after another")

    # By N as a number: writers sort names, and "10.png" comes before "2.png".
    members.sort(key=lambda member: member[:2])
    columns = np.array([(sample, *rest) for sample, _, *rest in members], dtype=np.int64).reshape(-1, 5)
    texts = np.bincount(columns[columns[:, 1] == 0, 0], minlength=len(keys))
    if len(keys) and texts.min() == 0:
        raise DataError(f"{tar}: sample '{keys[int(texts.argmin())]}' has no text (.json or .txt)")
    encoded = [key.encode(errors="surrogateescape") for key in keys]
    return ShardIndex(
        path=tar,
        key_bytes=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        key_ends=np.cumsum([len(key) for key in encoded], dtype=np.int64),
        member_ends=np.searchsorted(columns[:, 0], np.arange(len(keys)), side="right"),
        is_image=columns[:, 1].astype(bool),
        is_json=columns[:, 2].astype(bool),
        offset=columns[:, 3],
        size=columns[:, 4],
    )


def _check_end(tar: Path, offset: int) -> None:
    """A whole tar ends with a block of zeros, and zeros alone follow it.

    One that is cut off between two members, whose headers are damaged or that has another tar appended would otherwise
    pass as a shorter one.
    """
    with tar.open("rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise DataError(f"{tar}: truncated: the end-of-archive mark is missing; make or copy the shard again")
        while block:
            if block.strip(b"\0"):
                raise DataError(
                    f"{tar}: the archive ends at byte {offset}, but more than zeros follows: a damaged header, or "
                    f"several tars in one file; make or copy the shard again"
                )
            block = file.read(2**20)
