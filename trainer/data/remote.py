"""Shards on s3://, https:// and hf://: each is copied whole into a bounded folder on this host before it is read.

    url -> lock of the URL -> room under the limit -> temporary file -> size checked, fsync, rename -> the copy

Ranks and workers of a host share the folder. A URL is downloaded once, whoever asks; the copies used longest ago make
room for new ones, those that someone holds open do not. A shard is taken never to change under its URL, as its size is
all that is compared: give changed data another name, or name a revision (hf://datasets/USER/REPO@REVISION/...).
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.data.kept import kept_files
from trainer.errors import ConfigError, DataError, UserError
from trainer.urls import check_scheme, scheme_of, shown

TRIES = 3
"""Of every request, where the network fails."""
BACKOFF = 2.0
"""Seconds before the second try; four times as long before the third."""
CONNECT_SECONDS, READ_SECONDS = 30, 60
"""https gives up on a server that says nothing for so long; the whole download may take any time."""

INSTALL = {"s3": "s3fs", "https": "aiohttp", "hf": "huggingface_hub"}
ACCESS = {
    "s3": "credentials come as for the AWS command line, and FSSPEC_S3_ANON=true reads a public bucket",
    "https": "a name and password come from ~/.netrc, or a token stands in the URL's query",
    "hf": "a private repository needs `hf auth login` or HF_TOKEN",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COPY = re.compile(r"[0-9a-f]{16}-.*")
_TEMPORARY = re.compile(r"tmp-(\d+)-([0-9a-f]{16}-.*)")
"""Bytes it is going to have, and the name of its copy."""

logger = logging.getLogger(__name__)


class _Absent(DataError):
    """The server has no such file, or does not show it to us."""


def expand(pattern: str) -> list[str]:
    """The URLs of one whose brace ranges are expanded already; what a glob finds (s3, hf) is sorted, and may be none.

    Raises ConfigError for a glob on https and a missing package, DataError where the server refuses or fails.
    """
    check_scheme(pattern)
    scheme = scheme_of(pattern)
    if scheme in (None, "https") or not re.search(r"[*?[]", pattern):
        return [pattern]
    found = _ask(pattern, lambda files: files.glob(pattern, detail=True))
    return sorted(f"{scheme}://{name}" for name, info in found.items() if info["type"] == "file")


class ShardCache:
    """Local copies of remote shards, at most `limit_bytes` of them. Holds no lock or connection: fork or pickle it."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._locks = folder / "locks"

    def place(self, url: str) -> Path:
        """Where the copy of a URL lies, when there is one."""
        return self.folder / _name(url)

    def path(self, url: str, expected_size: int | None = None) -> Path:
        """The copy of a URL, downloaded if it is absent or has another size than expected (bytes).

        It may make room for another one as soon as this returns; `open` holds on to it. Raises DataError, or
        ConfigError for another scheme or a missing package.
        """
        check_scheme(url)
        assert scheme_of(url), "a local path has no copy"
        copy = self.place(url)
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            if not _use(copy, expected_size):
                with _locked(self._locks / copy.name):
                    if not _use(copy, expected_size):  # nobody was faster
                        self._download(url, copy, expected_size)
        except OSError as error:
            if error.errno in _FULL:
                full = f"{self.folder}: the disk is full, or a quota reached, with {shown(url)} still to come"
                raise DataError(f"{full}; free some space or lower data.cache_gib") from None
            raise DataError(
                f"{self.folder}: shards cannot be kept here ({error}); name a folder of yours on a local disk"
            ) from error
        return copy

    def open(self, url: str, expected_size: int | None = None) -> int:
        """A descriptor of the copy, to read and to close. Until it is closed, also in processes forked meanwhile, the
        copy is not removed. Raises as `path` does."""
        while True:
            try:
                descriptor = os.open(self.path(url, expected_size), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # it has made room for another since
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink:
                return descriptor
            os.close(descriptor)

    def index_path(self, url: str) -> Path | None:
        """The copy of the index that lies beside a shard (URL.index.npz), to be read at once; None if it has none.

        "Forbidden" counts as none: it is what a bucket whose list is not public says of a file that it does not have.
        """
        address, mark, query = url.partition("?")
        try:
            return self.path(f"{address}.index.npz{mark}{query}")
        except _Absent:
            return None

    def _download(self, url: str, copy: Path, expected_size: int | None) -> None:
        """Makes the copy. Its URL's lock is held."""
        info = _ask(url, lambda files: files.info(url))
        size = expected_size if info["size"] is None else info["size"]
        if info["type"] != "file":
            raise DataError(f"{shown(url)}: a folder; name its shards, as in data-{{000..099}}.tar")
        if size is None:
            raise DataError(f"{shown(url)}: the server does not say how large it is, so a part could pass as the whole")
        if expected_size not in (None, size):
            raise DataError(
                f"{shown(url)}: {size} bytes, but its index was made of {expected_size}: it has changed at its source; "
                f"{again(url)}"
            )
        partial = self._reserve(url, copy.name, size)

        def fetch(files: Any) -> None:
            partial.write_bytes(b"")  # nothing of an earlier try
            files.get_file(url, str(partial))
            if (found := partial.stat().st_size) != size:
                raise ConnectionError(f"received {found} of {size} bytes")

        try:
            _ask(url, fetch)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            with _locked(self._locks / "room"):  # names change under this lock only: whoever counts sees each once
                partial.rename(copy)
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, url: str, name: str, size: int) -> Path:
        """An empty temporary file that stands for `size` bytes; what is not in use makes room for it, oldest first."""
        limit = f"data.cache_gib ({self.limit_bytes / 2**30:.3g})"
        if size > self.limit_bytes:
            raise DataError(f"{shown(url)}: {size / 2**30:.3g} GiB, more than {limit}; raise it or make smaller shards")
        with _locked(self._locks / "room"):
            used, copies = 0, []
            for file in self.folder.iterdir():
                if match := _TEMPORARY.fullmatch(file.name):
                    # Its process was killed if its URL's lock is free, or is the one that we hold.
                    if match[2] == name:
                        file.unlink()
                    elif not _removed(file, self._locks / match[2]):
                        used += int(match[1])
                elif _COPY.fullmatch(file.name):
                    stat = file.stat()
                    used += stat.st_size
                    copies.append((stat.st_atime_ns, stat.st_size, file))
            for _, freed, file in sorted(copies):
                short = used + size > self.limit_bytes or shutil.disk_usage(self.folder).free < size
                if short and _removed(file, lock=file):
                    used -= freed
            if used + size > self.limit_bytes:
                raise DataError(
                    f"{self.folder}: no room for {shown(url)} ({size / 2**30:.3g} GiB): {used / 2**30:.3g} GiB are in "
                    f"use, which is too near to {limit}; raise it, make smaller shards or lower data.num_workers"
                )
            if shutil.disk_usage(self.folder).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            partial = self.folder / f"tmp-{size}-{name}"
            partial.touch()
        return partial


def again(url: str) -> str:
    """The way out where a remote shard and its index do not agree."""
    return f"put the old one back, or remove {kept_files(url, 'index')[0]} and start a new run with the new one"


def _name(url: str) -> str:
    base = re.sub(r"[^A-Za-z0-9._-]", "_", url.partition("?")[0].rpartition("/")[2])
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{base[-100:]}"


def _use(copy: Path, expected_size: int | None) -> bool:
    """Whether the copy is there; notes the time. The time of change stays: an index made of the copy is tied to it."""
    try:
        stat = copy.stat()
        if expected_size not in (None, stat.st_size):
            return False
        os.utime(copy, ns=(time.time_ns(), stat.st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would not do: a process forked meanwhile has it open too
        os.close(descriptor)


def _removed(file: Path, lock: Path) -> bool:
    """Removes the file unless someone holds the lock."""
    descriptor = os.open(lock, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


@lru_cache
def _files(scheme: str, _process: int) -> Any:
    """The fsspec file system, one for each process: its connections and its thread do not survive a fork."""
    import fsspec  # most runs read local shards, and have neither this nor its packages to wait for

    if scheme != "https":
        if scheme == "hf":
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()
        return fsspec.filesystem(scheme, skip_instance_cache=True)
    import aiohttp

    async def stay_secure(_session: Any, _context: Any, redirect: Any) -> None:
        headers = redirect.response.headers
        if headers.get("Location", headers.get("URI", "")).lower().startswith("http:"):
            raise DataError(f"{shown(str(redirect.url))}: leads on to http://, where nothing protects the data")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(stay_secure)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    client = {"timeout": timeout, "trace_configs": [trace], "trust_env": True}  # proxies and .netrc
    return fsspec.filesystem("https", client_kwargs=client, skip_instance_cache=True)


def _ask(url: str, act: Callable[[Any], Any]) -> Any:
    """`act` with the URL's file system, tried again where the network fails. Raises DataError or ConfigError."""
    scheme = scheme_of(url) or ""
    for attempt in range(1, TRIES + 1):
        try:
            return act(_files(scheme, os.getpid()))
        except Exception as error:  # each file system has classes of its own
            if isinstance(error, OSError) and error.errno in _FULL:
                raise
            # "from None": what the error says may hold the secret part of the URL.
            if final := _final(url, scheme, error):
                raise final from None
            cause = error.__cause__ or error
            said = f"{type(cause).__name__}: {' '.join(shown(str(cause)).split())}"
        if attempt < TRIES:
            logger.warning("%s: %s; trying again (%d of %d)", shown(url), said, attempt + 1, TRIES)
            time.sleep(BACKOFF * 4 ** (attempt - 1))
    raise DataError(f"{shown(url)}: not fetched in {TRIES} tries ({said}); check the network and the server")


def _final(url: str, scheme: str, error: BaseException) -> UserError | None:
    """What to say of an error that trying again would not mend."""
    if scheme == "https" and isinstance(error, FileNotFoundError) and error.__cause__:
        error = error.__cause__  # fsspec gives every failure of `info` that name
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None) or 0
    if isinstance(error, UserError):
        return error
    if isinstance(error, ImportError):
        return ConfigError(f"{shown(url)}: {scheme}:// needs a package ({error}): pip install {INSTALL[scheme]}")
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return _Absent(f"{shown(url)}: the server has no such file; check the address ({ACCESS[scheme]})")
    if isinstance(error, PermissionError) or status in (401, 403):
        return _Absent(f"{shown(url)}: the server does not let us read it; {ACCESS[scheme]}")
    if hasattr(error, "certificate_error"):
        return DataError(
            f"{shown(url)}: the server's certificate is not trusted ({error.certificate_error}); if it should be, "
            f"name the certificates to trust in SSL_CERT_FILE"
        )
    if 400 <= status < 500 and status not in (408, 425, 429):
        return DataError(f"{shown(url)}: the server refuses (status {status})")
    return None
