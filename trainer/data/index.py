"""One index per tar: for every sample its key and, of each member, kind, place, size and, of pictures, their shape.

With it a sample is read by offset, in any order, without scanning. The index lies beside its tar, or, where that folder
is read-only, in a cache folder; it is used as long as the tar's size and time of change are those it was made from.
"""

import hashlib
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.kept import load_kept, save_kept
from trainer.data.picture import header_size
from trainer.errors import DataError
from trainer.urls import shown

VERSION = 5
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("json", "txt")
BLOCK = 512
"""Bytes of a tar block; headers and data are padded to it."""

MAX_MEMBER_BYTES = 1 << 30
"""A member larger than this is not read: no picture or text of use is, and one read of Linux ends at 2 GiB."""

HEADER_BYTES = 1 << 16
"""Of a picture, read for its shape; where they do not suffice (large metadata), all of it is."""


@dataclass(frozen=True)
class Shard:
    """What a run keeps of every tar: a few words, however many samples are in it."""

    path: Path
    """Of a remote shard, where its local copy is while it is needed."""
    samples: int
    digest: str
    """Hash of the tar's size, its headers, and the first `HEADER_BYTES` of each member of a sample."""
    size: int
    """Bytes of the tar when it was indexed."""
    mtime_ns: int
    """Its time of change then."""
    keys: str = ""
    """Hash of the samples' keys."""
    url: str = ""
    """Of a remote shard."""

    @property
    def place(self) -> Path | str:
        """What it is known by: its path, or its URL."""
        return self.url or self.path

    @property
    def name(self) -> str:
        """As `place`, for people: a URL without its query, which may be secret."""
        return shown(self.url) or str(self.path)

    def __len__(self) -> int:
        return self.samples


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where the samples of one tar lie. S samples, M members."""

    shard: Shard
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
    width: np.ndarray
    """(M,) int32: pixels, as the picture's header says; 0 for texts and where there is no readable header."""
    height: np.ndarray
    """(M,) int32."""

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, i: int) -> str:
        return self.key_bytes[self.key_ends[i - 1] if i else 0 : self.key_ends[i]].tobytes().decode(errors="replace")

    def members(self, i: int) -> slice:
        """Rows of sample `i` in the member columns."""
        return slice(self.member_ends[i - 1] if i else 0, self.member_ends[i])

    def images(self) -> np.ndarray:
        """(S,) int64: pictures of each sample."""
        ends = np.concatenate([[0], np.cumsum(self.is_image)])[self.member_ends]
        return np.diff(ends, prepend=0)


_COLUMNS = ("key_bytes", "key_ends", "member_ends", "is_image", "is_json", "offset", "size", "width", "height")
_SHARD = ("stamp", "samples", "digest", "keys")


def open_index(tar: Path) -> ShardIndex:
    """The index of a tar, read if it is current, made (and kept) otherwise. Raises DataError if the tar is damaged."""
    if index := kept_index(tar, tar, [VERSION, *_stat(tar)]):
        return index
    index = scan(tar)
    keep_index(tar, index)
    return index


def find_shard(tar: Path) -> Shard | None:
    """The few words that a run keeps of a tar, from its index; None if that is to be made. Raises DataError if there
    is no tar."""
    stored = load_kept(tar, "index", [VERSION, *_stat(tar)], _SHARD)
    return stored_shard(stored, tar) if stored else None


def kept_index(place: Path | str, path: Path, stamp: list[int], url: str = "") -> ShardIndex | None:
    """The index kept for a tar (a path or a URL) under a stamp, or under one that begins so."""
    stored = load_kept(place, "index", stamp, (*_SHARD, *_COLUMNS))
    if not stored:
        return None
    return ShardIndex(stored_shard(stored, path, url), **{name: stored[name] for name in _COLUMNS})


def keep_index(place: Path | str, index: ShardIndex) -> None:
    """Keeps an index for a tar (a path or a URL)."""
    hashes = {name: np.frombuffer(bytes.fromhex(getattr(index.shard, name)), np.uint8) for name in ("digest", "keys")}
    stamp = [VERSION, index.shard.size, index.shard.mtime_ns]
    columns = {name: getattr(index, name) for name in _COLUMNS}
    save_kept(place, "index", stamp, {"samples": np.array(len(index)), **hashes, **columns})


def differing_columns(one: ShardIndex, other: ShardIndex) -> list[str]:
    """Names of the columns in which two indexes of one tar differ."""
    return [name for name in _COLUMNS if not np.array_equal(getattr(one, name), getattr(other, name))]


def stored_shard(stored: dict[str, np.ndarray], path: Path, url: str = "") -> Shard:
    _, size, mtime_ns = stored["stamp"].tolist()
    digest, keys = (stored[name].tobytes().hex() for name in ("digest", "keys"))
    return Shard(path, int(stored["samples"]), digest, size, mtime_ns, keys, url)


def _stat(tar: Path) -> tuple[int, int]:
    try:
        stat = tar.stat()
    except OSError as error:
        raise DataError(f"{tar}: the shard cannot be read ({error.strerror})") from error
    return stat.st_size, stat.st_mtime_ns


def scan(tar: Path) -> ShardIndex:
    """Reads the headers of a tar. Members `KEY.EXT` (or `KEY.N.EXT`, ordered by N) that stand together make a sample.

    Raises DataError for a truncated or damaged tar and for a sample whose members do not stand together or come twice.
    """
    size, mtime_ns = _stat(tar)
    if tar.is_dir():
        raise DataError(f"{tar}: a folder, expected a tar; write '{tar}/*.tar'")
    digest = hashlib.sha256(f"{size}".encode())
    keys: list[str] = []
    names: set[str] = set()  # of the members of the last sample
    # sample, N, is_image, is_json, offset, size, width, height
    members: list[tuple[int, int, bool, bool, int, int, int, int]] = []
    try:
        with tar.open("rb") as file, tarfile.open(tar, "r:") as archive:
            for member in archive:
                header = (member.name, member.size, member.offset_data, member.mtime, member.chksum)
                digest.update(repr(header).encode(errors="surrogateescape"))
                if (parts := _parse_name(member)) is None:
                    continue
                key, number, extension = parts
                if not keys or keys[-1] != key:
                    keys.append(key)
                    names.clear()
                if member.name in names:
                    raise DataError(f"{tar}: member {member.name} comes twice; each sample needs a key of its own")
                names.add(member.name)
                end = member.offset_data + member.size
                if end > size:
                    raise DataError(f"{tar}: truncated: member {member.name} ends at byte {end}, beyond the file")
                is_image = extension in IMAGE_EXTENSIONS
                start = os.pread(file.fileno(), min(HEADER_BYTES, member.size), member.offset_data)
                digest.update(start)
                shape = _picture_shape(file.fileno(), member, start) if is_image else (0, 0)
                place = (member.offset_data, member.size, *shape)
                members.append((len(keys) - 1, number, is_image, extension == "json", *place))
            _check_end(tar, archive.offset)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar}: not a readable tar ({error}); make the shard again") from error
    if len(set(keys)) < len(keys):
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise DataError(
            f"{tar}: the members of sample '{twice}' do not stand together; write them one after "
            f"another (GNU tar does with --sort=name)"
        )

    # By N as a number: writers sort names, and "10.png" comes before "2.png".
    members.sort(key=lambda member: member[:2])
    columns = np.array([(sample, *rest) for sample, _, *rest in members], dtype=np.int64).reshape(-1, 7)
    encoded = [key.encode(errors="surrogateescape") for key in keys]
    key_bytes = b"".join(encoded)
    return ShardIndex(
        shard=Shard(tar, len(keys), digest.hexdigest(), size, mtime_ns, hashlib.sha256(key_bytes).hexdigest()),
        key_bytes=np.frombuffer(key_bytes, dtype=np.uint8),
        key_ends=np.cumsum([len(key) for key in encoded], dtype=np.int64),
        member_ends=np.searchsorted(columns[:, 0], np.arange(len(keys)), side="right"),
        is_image=columns[:, 1].astype(bool),
        is_json=columns[:, 2].astype(bool),
        offset=columns[:, 3],
        size=columns[:, 4],
        width=columns[:, 5].astype(np.int32),
        height=columns[:, 6].astype(np.int32),
    )


def _parse_name(member: tarfile.TarInfo) -> tuple[str, int, str] | None:
    """Key, number and extension of a member that belongs to a sample; None for any other."""
    folder, _, name = member.name.rpartition("/")
    stem, dot, extension = name.partition(".")
    number, _, extension = extension.lower().rpartition(".")
    if not (member.isfile() and stem and dot and extension in IMAGE_EXTENSIONS + TEXT_EXTENSIONS):
        return None
    if number and not number.isdecimal():
        return None  # KEY.seg.png is of another use than KEY.png and KEY.0.png
    return f"{folder}/{stem}" if folder else stem, int(number or 0), extension


def _picture_shape(file: int, member: tarfile.TarInfo, start: bytes) -> tuple[int, int]:
    shape = header_size(start)
    if shape == (0, 0) and len(start) < member.size <= MAX_MEMBER_BYTES:
        shape = header_size(os.pread(file, member.size, member.offset_data))
    return shape


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
