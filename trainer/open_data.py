"""What a configuration says of data -> sources, reader, lengths and the stream of rows.

Training and `launch/inspect_step.py` both come here, so that they see the same samples.
"""

from functools import partial
from pathlib import Path

from trainer.config import Config, DataConfig, ShardsConfig, expand_shards
from trainer.data.index import Shard, find_shard, open_index
from trainer.data.kept import cache_folder
from trainer.data.lengths import Lengths
from trainer.data.order import Stream
from trainer.data.parallel import in_processes
from trainer.data.plan import NamedSource, check_distinct, make_stream
from trainer.data.reader import OPEN_SHARDS, ShardReader
from trainer.data.remote import ShardCache, expand
from trainer.data.remote_index import find_remote, open_remote
from trainer.data.template import ChatTemplate
from trainer.dist import log
from trainer.errors import ConfigError


def open_cache(data: DataConfig) -> ShardCache:
    """The local copies of remote shards."""
    folder = Path(data.cache_dir) if data.cache_dir else cache_folder() / "shards"
    return ShardCache(folder, int(data.cache_gib * 2**30))


def open_sources(configs: list[ShardsConfig], cache: ShardCache) -> list[NamedSource]:
    """The shards of each source, in the order of the configuration; missing indexes are made, on all cores.

    Raises DataError for a damaged tar, where two tars hold the same samples, and where a remote glob finds nothing;
    ConfigError where the cache is too small for the shards that are read at a time.
    """
    places = [[one for place in expand_shards(source.shards) for one in _expand(place)] for source in configs]
    found = {place: _find(place, cache) for of_source in places for place in of_source}
    missing = [place for place, shard in found.items() if shard is None]
    made = in_processes(partial(_make, cache=cache), missing, "indexing shards")
    kept = {place: shard for place, shard in found.items() if shard is not None}  # one without a sample is false
    shards = kept | dict(zip(missing, made, strict=True))
    sources = [
        NamedSource(config.name, [shards[place] for place in of_source], config.weight)
        for config, of_source in zip(configs, places, strict=True)
    ]
    for config, source in zip(configs, sources, strict=True):
        if not source.shards:
            raise ConfigError(f"data: source '{config.name}': {config.shards} matches no shard")
    opened = [shard for source in sources for shard in source.shards]
    check_distinct(opened)
    _check_cache([shard.size for shard in opened if shard.url], cache)
    for shard in opened:
        if not shard.samples:
            log.warning("%s holds no sample", shard.name)
    return sources


def _expand(place: Path | str) -> list[Path] | list[str]:
    return expand(place) if isinstance(place, str) else [place]


def _find(place: Path | str, cache: ShardCache) -> Shard | None:
    return find_remote(place, cache) if isinstance(place, str) else find_shard(place)


def _make(place: Path | str, cache: ShardCache) -> Shard:
    return (open_remote(place, cache) if isinstance(place, str) else open_index(place)).shard


def _check_cache(sizes: list[int], cache: ShardCache) -> None:
    """What is open at a time is held by the processes that read it; half as much again is for what comes next."""
    needed = sum(sorted(sizes)[-OPEN_SHARDS * 3 // 2 :])
    if needed > cache.limit_bytes:
        raise ConfigError(
            f"data.cache_gib={cache.limit_bytes / 2**30:.3g} is too small for the {len(sizes)} remote shards: up to "
            f"{OPEN_SHARDS * 3 // 2} of them are needed at a time, {needed / 2**30:.3g} GiB; raise it, or make "
            f"smaller shards"
        )


def open_reader(sources: list[NamedSource], data: DataConfig, cache: ShardCache) -> ShardReader:
    """Reads the samples of all sources."""
    shards = [shard for source in sources for shard in source.shards]
    return ShardReader(shards, data.system_prompt, data.caption_prompt, cache)


def open_lengths(config: Config, reader: ShardReader, template: ChatTemplate) -> Lengths | None:
    """The samples' lengths, if the configuration plans with them; `Lengths.build` measures them."""
    if config.data.packing or config.train.micro_batch_tokens is not None:
        return Lengths(reader, template)
    return None


def open_stream(config: Config, sources: list[NamedSource], lengths: Lengths | None) -> Stream:
    """The rows that a run trains on, ending after its epochs, if it has a number of them."""
    data = config.data
    stream = make_stream(sources, config.run.seed, lengths if data.packing else None, data.max_length)
    samples, shards = sum(len(s) for source in sources for s in source.shards), sum(len(s.shards) for s in sources)
    rows = " + ".join(f"{source.order.epoch_size:,}" for source in stream.sources)
    log.info(
        "%s samples in %s shards: %s %s an epoch",
        f"{samples:,}",
        f"{shards:,}",
        rows,
        "packs" if data.packing else "rows",
    )
    if config.train.epochs is not None:
        (source,) = stream.sources
        stream.end = config.train.epochs * source.order.epoch_size
    return stream
