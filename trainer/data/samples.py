"""What travels through the data pipeline. Read this first.

    tar members -> Turns and pictures -> Example -> Batch -> model
                                `---> Rejected -> ledger

B rows of a batch, T tokens of its longest row, N images of the batch, H x W pixels.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch

IGNORE_INDEX = -100
"""Label of a token that is not supervised."""

IMAGE_MARK = "<image>"
"""Where an image stands in a conversation's text (LLaVA's convention)."""


@dataclass
class Turn:
    """One message: `role` is "system", "user" or "assistant"; text holds `IMAGE_MARK` where an image stands."""

    role: str
    text: str


@dataclass
class Example:
    """A sample as the model reads it; its length is final."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`; `IGNORE_INDEX` where nothing is supervised. Not shifted: the model shifts."""
    pixel_values: torch.Tensor
    """(images, 3, H, W) uint8."""
    truncated_tokens: int = 0


@dataclass(frozen=True)
class Rejected:
    """A sample that could not be used, as the ledger names it."""

    shard: str
    key: str
    kind: str
    """What is wrong, in words that many samples share."""
    reason: str


class Batch(TypedDict):
    """A micro-batch of one rank."""

    input_ids: torch.Tensor
    """(B, T) int64, padded on the right; packed: (1, T), all documents of all rows one after another."""
    labels: torch.Tensor
    """(B, T) int64, `IGNORE_INDEX` on padding and on the first token of a document, which nothing precedes.

    Padding on the right needs no attention mask in a causal model: no real token attends to it, and nothing is
    supervised on it."""
    pixel_values: torch.Tensor
    """(N, 3, H, W) uint8, all images of the rows in reading order; N may be 0."""
    document_ends: list[int] | None
    """Packed: where each document ends in T. Attention, positions and loss stay inside a document."""
    tokens: int
    """Real tokens, padding and fillers left out."""
    squares: int
    """Sum of the squared lengths of the samples: what attention takes."""
    truncated_samples: int
    """Samples whose text was cut at its end."""
    truncated_tokens: int
    keys: list[str]
    """Of the samples in the rows, those left out apart."""
    rejected: list[Rejected]
    """Samples of the rows that are left out, because they could not be used."""
    is_last: bool
    """Of its step."""
