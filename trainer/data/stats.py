"""What is in shards, in numbers: samples, images, how long the texts are, and what packing them saves.

Lengths are those that packing plans with (trainer/data/lengths.py), kept beside the index; no picture is decoded.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np

from trainer.data.index import ShardIndex
from trainer.data.lengths import Lengths
from trainer.data.order import Slot, permutation
from trainer.data.parallel import in_processes
from trainer.data.picture import MAX_PIXELS, TOO_LARGE, UNDECODABLE
from trainer.data.plan import NamedSource, make_stream
from trainer.data.remote_index import open_any
from trainer.errors import BadSample

BINS = 16
"""Of the histogram, at most."""
BAR = 48
"""Characters of its longest bar."""


@dataclass(frozen=True)
class Stats:
    """S samples, of which U can be used."""

    shards: int
    images: np.ndarray
    """(S,) int64: pictures of each sample."""
    bad: Counter[str]
    """Samples that a run would leave out, by kind."""
    text_tokens: np.ndarray
    """(U,) int64: control tokens included, image features left out."""
    lengths: np.ndarray
    """(U,) int64: all tokens, uncut."""
    packs: int
    """Of `max_length` tokens, that all samples take."""


def measure(lengths: Lengths, sources: list[NamedSource], max_length: int) -> Stats:
    """Measures the shards of all sources, those of the lengths' reader, on all cores.

    Raises DataError for a damaged shard, and where there is no sample.
    """
    lengths.build()
    shards = lengths.reader.shards
    found = list(in_processes(partial(_shard_numbers, lengths, max_length), range(len(shards)), "counting"))
    images, totals, usable = (np.concatenate([numbers[column] for numbers in found]) for column in range(3))
    # As a run plans them, before it is known which samples are bad; the seed is of their order alone.
    stream = make_stream(sources, 0, lengths, max_length)
    return Stats(
        shards=len(shards),
        images=images,
        bad=sum((bad for *_, bad in found), Counter()),
        text_tokens=(totals - images * len(lengths.template.image_run))[usable],
        lengths=totals[usable],
        packs=sum(source.order.epoch_size for source in stream.sources),
    )


def _shard_numbers(
    lengths: Lengths, max_length: int, number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Counter[str]]:
    """Of each sample of a shard images, tokens, whether it can be used: (S,) int64, int64, bool; and what is wrong."""
    with lengths.reader as reader:
        index, totals = open_any(reader.shards[number].place, reader.cache), lengths.of(number)
        bad = _bad_pictures(index)
        for i in np.flatnonzero((totals == 0) | (totals > max_length)).tolist():
            try:
                input_ids, labels = lengths.template.encode(reader.conversation(Slot(number, i)))
                lengths.template.truncate(input_ids, labels, max_length)
            except BadSample as error:
                bad[i] = error.kind
    usable = np.ones(len(index), dtype=bool)
    usable[list(bad)] = False
    return index.images(), totals, usable, Counter(bad.values())


def _bad_pictures(index: ShardIndex) -> dict[int, str]:
    """Sample -> what is wrong with a picture of it, as far as the headers tell."""
    pixels, bad = index.width.astype(np.int64) * index.height, {}
    for kind, wrong in ((UNDECODABLE, pixels == 0), (TOO_LARGE, pixels > MAX_PIXELS)):
        members = np.flatnonzero(index.is_image & wrong)
        bad.update(dict.fromkeys(np.searchsorted(index.member_ends, members, side="right").tolist(), kind))
    return bad


def padded_positions(lengths: np.ndarray, batch_size: int) -> int:
    """Positions of all batches if each is padded to its longest sample, in a random order (the same every time)."""
    shuffled = lengths[permutation(len(lengths), 0)]
    starts = np.arange(0, len(lengths), batch_size)
    rows = np.diff(starts, append=len(lengths))
    return int((np.maximum.reduceat(shuffled, starts) * rows).sum()) if len(lengths) else 0


def histogram(values: np.ndarray) -> str:
    """A bar chart in text. values: (S,) int, one or more; the bins grow by the same factor each."""
    low, high = max(1, int(values.min())), int(values.max()) + 1
    edges = np.unique(np.geomspace(low, max(low + 1, high), BINS + 1).round().astype(np.int64))
    counts = np.histogram(np.maximum(values, 1), edges)[0]
    lines = []
    for first, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * int(np.ceil(BAR * count / counts.max()))
        lines.append(f"  {first:>8,} - {end - 1:<8,} {count:>10,}  {bar}".rstrip())
    return "\n".join(lines)


def describe(stats: Stats, max_length: int, image_length: int, batch_size: int) -> str:
    """The numbers as a person reads them in a terminal."""
    samples, bad = len(stats.images), sum(stats.bad.values())
    lines = [
        f"samples   {samples:,} in {stats.shards:,} shards",
        f"images    {int(stats.images.sum()):,}; of a sample: {_image_shares(stats.images)}",
        f"left out  {bad:,} ({bad / max(samples, 1):.2%}), as texts and picture headers tell; verify names them",
        *(f"  {count:,}  {kind}" for kind, count in stats.bad.most_common()),
    ]
    if not len(stats.lengths):
        return "\n".join([*lines, "no sample can be used"])
    over = stats.lengths[stats.lengths > max_length]
    useful = int(np.minimum(stats.lengths, max_length).sum())
    padded = padded_positions(np.minimum(stats.lengths, max_length), batch_size)
    lines += [
        f"tokens    {int(stats.lengths.sum()):,}, {image_length} for each image included; of a sample: "
        f"{_spread(stats.lengths)}",
        f"cut       {len(over):,} ({len(over) / len(stats.lengths):.2%}) are longer than {max_length} and lose "
        f"{int((over - max_length).sum()):,} tokens",
        f"\ntext tokens of a sample: {_spread(stats.text_tokens)}",
        histogram(stats.text_tokens),
        "\npositions that a run computes, and how many of them hold a token",
        f"  padded  {padded:>14,}  {useful / padded:6.1%}  batches of {batch_size} in random order",
        # Documents of packed rows follow one another, and a row ends with its last: no position is padding.
        f"  packed  {useful:>14,}  {1:6.1%}  {stats.packs:,} packs, {useful / (stats.packs * max_length):.1%} full of "
        f"{max_length}",
        f"packing saves {padded - useful:,} positions, {1 - useful / padded:.1%}",
    ]
    return "\n".join(lines)


def _image_shares(images: np.ndarray) -> str:
    shares = np.bincount(np.minimum(images, 10)) / max(len(images), 1)
    return ", ".join(f"{'10 or more' if n == 10 else n} ({share:.1%})" for n, share in enumerate(shares) if share)


def _spread(values: np.ndarray) -> str:
    low, middle, high, last = np.percentile(values, [0, 50, 95, 100]).astype(int)
    return f"{low:,} to {last:,}, mean {values.mean():,.1f}, median {middle:,}, 95% up to {high:,}"
