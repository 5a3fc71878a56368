"""How much of a batch is padding: padded at random, grouped by length under a token budget, and packed.

    python benchmarks/packing.py [--samples 20000]

The lengths are drawn to be like those of LLaVA-1.5's instruction mix: short questions about a picture, long
conversations and descriptions, and a few texts without a picture that fill the model's length. Prints a Markdown table:
the useful share of the positions that each way takes. Packed rows are computed without padding; their share says how
full a pack of `max_length` tokens is, which the memory is planned for. Leaves with 1 if that is below 97 %.
"""

import argparse
import sys
from collections.abc import Iterator

import numpy as np

from trainer.data.order import group_by_length
from trainer.data.packing import GROUP_SAMPLES, pack_shapes

IMAGE_TOKENS = 256
MICRO_BATCH = 8
GLOBAL_BATCH = 128
LEAST_USEFUL = 0.97

MIX = [(0.55, 4.6, 0.5, True), (0.35, 5.7, 0.5, True), (0.06, 6.9, 0.6, False), (0.04, 5.0, 0.8, True)]
"""Share of the samples, mean and deviation of the logarithm of the text's tokens, whether there is a picture: questions
and answers, conversations and descriptions, texts of ShareGPT, the rest."""


def draw_lengths(rng: np.random.Generator, samples: int, max_length: int) -> np.ndarray:
    """(samples,) int64 tokens, pictures included, cut at `max_length`."""
    kind = rng.choice(len(MIX), samples, p=[share for share, *_ in MIX])
    _, mean, deviation, picture = (np.array(column)[kind] for column in zip(*MIX, strict=True))
    text = rng.lognormal(mean, deviation).astype(np.int64) + 20
    return np.minimum(text + IMAGE_TOKENS * picture, max_length)


def padded(lengths: np.ndarray) -> float:
    rows = lengths[: len(lengths) // MICRO_BATCH * MICRO_BATCH].reshape(-1, MICRO_BATCH)
    return rows.sum() / (rows.max(axis=1) * MICRO_BATCH).sum()


def grouped(lengths: np.ndarray, budget: int) -> float:
    positions = 0
    for batch in in_parts(lengths, GLOBAL_BATCH):
        groups = group_by_length(batch.tolist(), budget, world_size=1)
        positions += sum(len(group) * int(batch[group].max()) for group in groups)
    return lengths.sum() / positions


def packed(lengths: np.ndarray, max_length: int) -> float:
    packs = sum(pack_shapes(part, max_length).count for part in in_parts(lengths, GROUP_SAMPLES))
    return lengths.sum() / (packs * max_length)


def in_parts(lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(lengths), size):
        yield lengths[start : start + size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20000)
    samples = parser.parse_args().samples
    print(
        f"{samples} samples; padded: {MICRO_BATCH} rows at random; budget: groups of a global batch of {GLOBAL_BATCH}"
    )
    print("\n| max_length | mean length | padded | token budget | packed |\n|---|---|---|---|---|")
    least = 1.0
    for max_length in (2048, 4096, 8192):
        lengths = draw_lengths(np.random.default_rng(0), samples, max_length)
        shares = padded(lengths), grouped(lengths, MICRO_BATCH * max_length // 2), packed(lengths, max_length)
        print(f"| {max_length} | {lengths.mean():.0f} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
        least = min(least, shares[2])
    if least < LEAST_USEFUL:
        sys.exit(1)


if __name__ == "__main__":
    main()
