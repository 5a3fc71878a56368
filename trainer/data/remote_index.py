"""Indexes of remote shards, and their copies, checked against them.

An index is kept by URL. It comes from beside the shard (URL.index.npz), or, where there is none, from a copy made for
that purpose.
"""

import os
from dataclasses import replace
from pathlib import Path

from trainer.data.index import VERSION, Shard, ShardIndex, keep_index, kept_index, scan
from trainer.data.remote import ShardCache
from trainer.errors import DataError


def find_remote(url: str, cache: ShardCache) -> Shard | None:
    """The few words that a run keeps of a remote shard, if its index is here."""
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


def open_copy(shard: Shard, cache: ShardCache) -> int:
    """A descriptor of a remote shard's local copy, of which every new one is held against the index.

    Raises DataError where the copy has other members than the index says.
    """
    file = cache.open(shard.url, shard.size)
    checked = Path(f"{cache.place(shard.url)}.checked")
    stamp = f"{shard.digest} {os.fstat(file).st_mtime_ns}"
    try:
        if checked.read_text() == stamp:
            return file
    except OSError:
        pass  # a new copy
    try:
        if scan(cache.place(shard.url)).shard.digest != shard.digest:
            raise DataError(
                f"{shard.name}: the shard is not the one that its index was made of; put the old one back, or "
                f"make the index again and start a new run"
            )
        checked.write_text(stamp)
    except BaseException:
        os.close(file)
        raise
    return file
