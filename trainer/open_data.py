"""What a configuration says of data -> sources, reader, lengths and the stream of rows.

Training and `launch/inspect_step.py` both come here, so that they see the same samples.
"""

from functools import partial
from pathlib import Path

from trainer.config import Config, DataConfig, ShardsConfig
from trainer.data.index import Shard, find_shard
from trainer.data.kept import cache_folder
from trainer.data.lengths import Lengths
from trainer.data.order import Stream
from trainer.data.parallel import in_processes
from trainer.data.plan import NamedSource, check_distinct, make_stream, shards_at_a_time
from trainer.data.reader import ShardReader
from trainer.data.remote import ShardCache, expand
from trainer.data.remote_index import REMOTE_WORKERS, find_remote, open_any
from trainer.data.template import ChatTemplate
from trainer.dist import World, check_same, log, on_each_host, on_ranks
from trainer.errors import ConfigError
from trainer.paths import expand_shards

MOST_OPEN = 512
"""Shards that a process holds open at most; it may usually open 1,024 files."""

HELD_OUT_OPEN = 4
"""Held-out shards that a process holds open: they are read one after another."""


def open_cache(data: DataConfig) -> ShardCache:
    """The local copies of remote shards."""
    folder = Path(data.cache_dir) if data.cache_dir else cache_folder() / "shards"
    return ShardCache(folder, int(data.cache_gib * 2**30))


def open_sources(configs: list[ShardsConfig], cache: ShardCache) -> list[NamedSource]:
    """The shards of each source, in the order of the configuration; missing indexes are made, on all cores.

    Raises DataError for a damaged tar and where two tars hold the same samples, ConfigError where a remote glob finds
    nothing.
    """
    places = [[one for place in expand_shards(source.shards) for one in _expand(place)] for source in configs]
    for config, of_source in zip(configs, places, strict=True):
        if not of_source:
            raise ConfigError(f"data: source '{config.name}': {config.shards} matches no shard")
    found = {place: _find(place, cache) for of_source in places for place in of_source}
    missing = [place for place, shard in found.items() if shard is None]
    workers = REMOTE_WORKERS if any(isinstance(place, str) for place in missing) else None
    made = in_processes(partial(_make, cache=cache), missing, "indexing shards", workers)
    kept = {place: shard for place, shard in found.items() if shard is not None}  # one without a sample is false
    shards = kept | dict(zip(missing, made, strict=True))
    sources = [
        NamedSource(config.name, [shards[place] for place in of_source], config.weight)
        for config, of_source in zip(configs, places, strict=True)
    ]
    opened = all_shards(sources)
    check_distinct(opened)
    for shard in opened:
        if not shard.samples:
            log.warning("%s holds no sample", shard.name)
    return sources


def open_on_all_ranks(data: DataConfig, world: World, cache: ShardCache) -> tuple[list[NamedSource], list[NamedSource]]:
    """The sources to train on and the held-out ones; one process of each host makes the indexes that are missing.

    Raises DataError also where ranks find different shards.
    """
    opened: list[list[NamedSource]] = []

    def open_both() -> None:
        opened[:] = [open_sources(data.train, cache), open_sources(data.eval, cache)]

    on_each_host(world, open_both)
    on_ranks(not opened, open_both)
    train, held_out = opened
    check_cache(train, held_out, data.packing, cache)
    check_same("the shards", " ".join(shard.digest for shard in all_shards(train) + all_shards(held_out)))
    trained_on = {shard.digest for shard in all_shards(train)}
    for shard in all_shards(held_out):
        if shard.digest in trained_on:
            log.warning("%s is held out, and trained on too: its loss says little", shard.name)
    return train, held_out


def all_shards(sources: list[NamedSource]) -> list[Shard]:
    """The shards of all sources, in their order."""
    return [shard for source in sources for shard in source.shards]


def _expand(place: Path | str) -> list[Path] | list[str]:
    return expand(place) if isinstance(place, str) else [place]


def _find(place: Path | str, cache: ShardCache) -> Shard | None:
    return find_remote(place, cache) if isinstance(place, str) else find_shard(place)


def _make(place: Path | str, cache: ShardCache) -> Shard:
    return open_any(place, cache).shard


def check_cache(train: list[NamedSource], held_out: list[NamedSource], packing: bool, cache: ShardCache) -> None:
    """Raises ConfigError where the cache has no room for the remote shards that are read at a time."""
    remote = sorted(shard.size for shard in all_shards(train) + all_shards(held_out) if shard.url)
    if not remote:
        return
    at_a_time = min(len(remote), shards_at_a_time(train, packing) + HELD_OUT_OPEN * bool(held_out) + REMOTE_WORKERS)
    needed = sum(remote[-at_a_time:])
    if needed > cache.limit_bytes:
        raise ConfigError(
            f"data.cache_gib={cache.limit_bytes / 2**30:.3g} is too small: up to {at_a_time} of the {len(remote)} "
            f"remote shards are needed at a time, {needed / 2**30:.3g} GiB; raise it, or make smaller shards"
        )


def open_reader(sources: list[NamedSource], data: DataConfig, cache: ShardCache, held_out: bool = False) -> ShardReader:
    """Reads the samples of all sources."""
    at_a_time = HELD_OUT_OPEN if held_out else shards_at_a_time(sources, data.packing)
    max_open = max(1, min(at_a_time, MOST_OPEN))
    return ShardReader(all_shards(sources), data.system_prompt, data.caption_prompt, cache, max_open)


def open_lengths(config: Config, reader: ShardReader, template: ChatTemplate) -> Lengths | None:
    """The samples' lengths, if the configuration plans with them; `Lengths.build` measures them."""
    if config.data.packing or config.train.micro_batch_tokens is not None:
        return Lengths(reader, template)
    return None


def open_stream(config: Config, sources: list[NamedSource], lengths: Lengths | None) -> Stream:
    """The rows that a run trains on, ending after its epochs, if it has a number of them."""
    data = config.data
    stream = make_stream(sources, config.run.seed, lengths if data.packing else None, data.max_length)
    if config.train.epochs is not None:
        (source,) = stream.sources
        stream.end = config.train.epochs * source.order.epoch_size
    return stream


def last_step(config: Config, stream: Stream) -> int:
    """The step with which a run ends: that of its last row, or as many as it is given."""
    return config.train.max_steps or -(-(stream.end or 0) // config.train.global_batch_size)


def plan(
    config: Config, world: World, sources: list[NamedSource], reader: ShardReader, template: ChatTemplate
) -> tuple[Stream, Lengths | None]:
    """The rows that a run trains on, and the lengths that they are planned with; what that takes is found out once on
    each host. All ranks call this."""
    lengths = open_lengths(config, reader, template)

    def measure() -> None:
        assert lengths is not None
        lengths.build()
        open_stream(config, sources, lengths)

    if lengths is not None:
        on_each_host(world, measure)
    stream = open_stream(config, sources, lengths)
    log.info("%s", describe_stream(sources, stream))
    rows, batch = sum(source.order.epoch_size for source in stream.sources), config.train.global_batch_size
    if batch > rows:
        log.warning("train.global_batch_size: a step takes %s rows, and there are %s", f"{batch:,}", f"{rows:,}")
    return stream, lengths


def describe_stream(sources: list[NamedSource], stream: Stream) -> str:
    """How much there is, in a line."""
    shards = all_shards(sources)
    rows = " + ".join(f"{source.order.epoch_size:,}" for source in stream.sources)
    plural = "s" * (len(shards) != 1)
    return f"{sum(map(len, shards)):,} samples in {len(shards):,} shard{plural}: {rows} rows an epoch"
