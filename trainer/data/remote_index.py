"""Indexes of shards wherever they are, and the copies of remote ones, checked against them.

The index of a URL is kept by that URL. It comes from beside the shard (URL.index.npz), or, where there is none, from a
copy made for that purpose.
"""

import os
from dataclasses import replace
from pathlib import Path

from trainer.data.index import VERSION, Shard, ShardIndex, differing_columns, keep_index, kept_index, open_index, scan
from trainer.data.remote import ShardCache, again
from trainer.errors import DataError

REMOTE_WORKERS = 4
"""Shards that are fetched at a time to be indexed or measured: each takes its room in the cache meanwhile."""


def open_any(place: Path | str, cache: ShardCache | None) -> ShardIndex:
    """The index of a tar at a path, or at a URL with a cache for its copies. Raises DataError if it cannot be had."""
    if isinstance(place, Path):
        return open_index(place)
    assert cache is not None
    return open_remote(place, cache)


def find_remote(url: str, cache: ShardCache) -> Shard | None:
    """What a run keeps of a remote shard, if its index is here; nobody is asked."""
    index = kept_index(url, cache.place(url), [VERSION], url)
    return index.shard if index else None


def open_remote(url: str, cache: ShardCache) -> ShardIndex:
    """The index of a remote shard. Raises DataError where neither it nor the shard can be had."""
    path = cache.place(url)
    if index := kept_index(url, path, [VERSION], url):
        return index
    beside = cache.index_path(url)
    # By the name of the tar beside which it would lie.
    index = kept_index(Path(str(beside).removesuffix(".index.npz")), path, [VERSION], url) if beside else None
    if index is None:
        file = cache.open(url)
        try:
            index = scan(path)
        finally:
            os.close(file)
        index = replace(index, shard=replace(index.shard, url=url))
    keep_index(url, index)
    return index


def open_copy(index: ShardIndex, cache: ShardCache) -> int:
    """A descriptor of a remote shard's local copy, of which every new one is held against the index.

    Raises DataError where the copy is not what the index says.
    """
    shard = index.shard
    file = cache.open(shard.url, shard.size)
    checked = Path(f"{cache.place(shard.url)}.checked")
    stamp = f"{shard.digest} {os.fstat(file).st_mtime_ns}"
    try:
        if checked.read_text() == stamp:
            return file
    except OSError:
        pass  # a new copy
    try:
        found = scan(cache.place(shard.url))
        if found.shard.digest != shard.digest or differing_columns(found, index):
            raise DataError(f"{shard.name}: the shard is not the one that its index was made of; {again(shard.url)}")
        checked.write_text(stamp)
    except BaseException:
        os.close(file)
        raise
    return file
