"""What travels through the data pipeline. Read this first.

    tar members -> Sample -> Example -> Batch -> model

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
class Sample:
    """What a shard holds under one key."""

    key: str
    images: list[bytes]
    """Encoded pictures, in the order of their marks."""
    conversation: list[Turn]


@dataclass
class Example:
    """A sample as the model reads it; its length is final."""

    key: str | None
    """None for a filler that keeps the shape of an epoch's last batch and supervises nothing."""
    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`; `IGNORE_INDEX` where nothing is supervised. Not shifted: the model shifts."""
    pixel_values: torch.Tensor
    """(images, 3, H, W) uint8."""
    truncated_tokens: int = 0


class Batch(TypedDict):
    """A micro-batch of one rank."""

    input_ids: torch.Tensor
    """(B, T) int64, padded on the right."""
    labels: torch.Tensor
    """(B, T) int64, `IGNORE_INDEX` on padding. Padding on the right needs no attention mask in a causal model: no
    real token attends to it, and nothing is supervised on it."""
    pixel_values: torch.Tensor
    """(N, 3, H, W) uint8, all images of the rows in reading order; N may be 0."""
    keys: list[str]
    """Of the samples, fillers left out."""
    tokens: int
    """Real tokens, padding and fillers left out."""
    truncated_tokens: int
