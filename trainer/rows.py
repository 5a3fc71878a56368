"""The rows that a configuration will train on: what memory, FLOPs and steps are planned with."""

from dataclasses import dataclass, replace
from pathlib import Path

from trainer.config import Config, ShardsConfig
from trainer.data.lengths import Lengths
from trainer.data.order import Row, Stream, group_by_length
from trainer.data.plan import NamedSource
from trainer.data.reader import ShardReader
from trainer.data.template import ChatTemplate
from trainer.errors import BadSample, DataError
from trainer.flops import BatchShape
from trainer.open_data import (
    check_cache,
    describe_stream,
    last_step,
    open_cache,
    open_lengths,
    open_reader,
    open_sources,
    open_stream,
)
from trainer.paths import expand_shards

LOOKED_AT = 256
"""Rows whose texts are encoded for the averages: the first of the stream, which is shuffled."""


@dataclass(frozen=True)
class Rows:
    """The rows of a run."""

    widest: BatchShape
    """The row that takes most memory: as long as one may be, with as many pictures as one had, all its text learnt."""
    mean: BatchShape
    """Of a row, without padding."""
    images_a_token: float
    """Of the row that has most of them."""
    padding: float
    """Share of the computed positions that are padding."""
    epoch_size: int | None
    """Rows of an epoch; None where the data is not there, or has weights."""
    last_step: int | None
    """Steps of the run, where they are known."""
    known: list[str]
    """What this was found out from, in words."""

    def largest_batch(self, config: Config) -> BatchShape:
        """A micro-batch of the widest rows, as many as are set; of a budget of tokens, as many as it holds, and as many
        pictures as if all its rows were the shortest ones with pictures."""
        batch = self.widest * self.micro_rows(config)
        if config.train.micro_batch_tokens is None:
            return batch
        return replace(batch, images=max(batch.images, self.images_a_token * batch.tokens))

    def micro_rows(self, config: Config) -> float:
        """Rows of that micro-batch."""
        tokens = config.train.micro_batch_tokens
        return config.train.micro_batch_size if tokens is None else tokens / self.widest.tokens


def missing_shards(sources: list[ShardsConfig]) -> list[str]:
    """The patterns that match no file on this machine; URLs are for their server to answer."""
    missing = []
    for source in sources:
        for pattern in [source.shards] if isinstance(source.shards, str) else source.shards:
            places = expand_shards(pattern)
            if not places or any(isinstance(place, Path) and not place.is_file() for place in places):
                missing.append(pattern)
    return missing


def full_rows(config: Config, image_length: int) -> Rows:
    """Without data: rows of `data.max_length` tokens. A sample shows one picture, and the rest is text; a pack has as
    much text as pictures, in documents of one picture each. Half of the text is an answer."""
    length = config.data.max_length
    if config.data.packing:
        images = max(1.0, length / (2 * image_length))
        mean = BatchShape(length, length**2 / images, images, (length - images * image_length) / 2, packed=True)
    else:
        mean = BatchShape(length, length**2, 1.0, (length - image_length) / 2)
    widest = replace(mean, squares=length**2, supervised=length - mean.images * image_length)
    missing = ", ".join(f"'{pattern}'" for pattern in missing_shards(config.data.train))
    known = [f"no data: {missing} matches no file here; assumed are full rows of data.max_length={length:,} tokens"]
    return Rows(widest, mean, widest.images / length, 0.0, None, config.train.max_steps, known)


def open_rows(config: Config, template: ChatTemplate) -> Rows:
    """The rows of shards that are there, opened as training opens them: missing indexes are made, and so are the
    samples' lengths where training would plan with them.

    Raises DataError and ConfigError as training would, for damaged shards and a cache that is too small.
    """
    cache = open_cache(config.data)
    sources = open_sources(config.data.train, cache)
    missing = missing_shards(config.data.eval)
    held_out = [] if missing else open_sources(config.data.eval, cache)
    check_cache(sources, held_out, config.data.packing, cache)
    with open_reader(sources, config.data, cache) as reader:
        lengths = open_lengths(config, reader, template)
        if lengths is not None:
            lengths.build()
        rows = stream_rows(config, sources, open_stream(config, sources, lengths), reader, template, lengths)
    left_out = [f"left out: data.eval, for '{pattern}' matches no file here" for pattern in missing]
    return replace(rows, known=rows.known + left_out)


def stream_rows(
    config: Config, sources: list[NamedSource], stream: Stream, reader: ShardReader, template: ChatTemplate,
    lengths: Lengths | None,
) -> Rows:  # fmt: skip
    """The rows of an opened stream. Raises DataError where none of the first can be used."""
    found = _look_at(config, stream, reader, template)
    longest = config.data.max_length
    if lengths is not None and not config.data.packing:
        longest = min(longest, max(int(lengths.of(i).max(initial=1)) for i in range(len(reader.shards))))
    if not found:
        raise DataError(
            "none of the first samples of data.train can be used: `launch/prepare_shards.py verify` says why"
        )
    images = max(shape.images for shape in found)
    mean = sum(found[1:], found[0]) * (1 / len(found))
    text = max(0.0, longest - images * len(template.image_run)) if images else longest
    known = [describe_stream(sources, stream)]
    looked_at = _first(stream)
    if len(found) < looked_at:
        known.append(
            f"{looked_at - len(found):,} of the first {looked_at:,} rows have no sample that can be used: "
            f"`launch/prepare_shards.py verify --config` says why"
        )
    known += [f"averages of the first {len(found):,} rows: {mean.tokens:,.0f} tokens, {mean.supervised:,.0f} of them "
              f"learnt, {mean.images:.2g} pictures"]  # fmt: skip
    return Rows(
        BatchShape(longest, longest**2, images, max(text, mean.supervised), config.data.packing), mean,
        max(shape.images / shape.tokens for shape in found), _padding(config, found),
        stream.sources[0].order.epoch_size if len(stream.sources) == 1 else None,
        last_step(config, stream), known,
    )  # fmt: skip


def _look_at(config: Config, stream: Stream, reader: ShardReader, template: ChatTemplate) -> list[BatchShape]:
    """The shapes of the first rows, those without a usable sample left out. Pictures are not read."""
    shapes = (_shape(config, stream.row(position), reader, template) for position in range(_first(stream)))
    return [shape for shape in shapes if shape is not None]


def _first(stream: Stream) -> int:
    """How many rows are looked at."""
    return LOOKED_AT if len(stream.sources) > 1 else min(LOOKED_AT, stream.sources[0].order.epoch_size)


def _shape(config: Config, row: Row, reader: ShardReader, template: ChatTemplate) -> BatchShape | None:
    lengths, images, supervised = [], 0, 0
    for slot in row:
        try:
            input_ids, labels = template.encode(reader.conversation(slot))
            input_ids, labels = template.truncate(input_ids, labels, config.data.max_length)
        except BadSample:
            continue  # left out in training too
        lengths.append(len(input_ids))
        images += input_ids.count(template.image_run[0]) // len(template.image_run)
        supervised += sum(label >= 0 for label in labels[1:])
    if not lengths:
        return None
    squares = sum(length**2 for length in lengths)
    return BatchShape(sum(lengths), squares, images, supervised, config.data.packing)


def _padding(config: Config, found: list[BatchShape]) -> float:
    """Share of padding in micro-batches of these rows."""
    if config.data.packing:
        return 0.0
    widths = [int(shape.tokens) for shape in found]
    micro, step = config.train.micro_batch_size, config.train.global_batch_size
    groups = [widths[start : start + micro] for start in range(0, len(widths), micro)]
    if config.train.micro_batch_tokens is not None:
        steps = [widths[start : start + step] for start in range(0, len(widths), step)]
        cut = [(of_step, group_by_length(of_step, config.train.micro_batch_tokens, 1)) for of_step in steps]
        groups = [[of_step[i] for i in group] for of_step, chosen in cut for group in chosen if group]
    return 1 - sum(widths) / sum(len(group) * max(group) for group in groups)
