"""Rotary positions of Qwen (v1), with its stretch for contexts beyond the trained length.

Shapes: B batch, T tokens, H heads, C channels a head.
"""

import math

import torch

from .configuration_qwen import QWenConfig


def ntk_alpha(length: int, seq_length: int) -> float:
    """Dynamic NTK factor of a context of `length` tokens in a model trained on `seq_length`. (source: Qwen v1)"""
    return max(2 ** math.ceil(math.log2(max(length, 1) / seq_length) + 1) - 1, 1.0)


def rotary_cos_sin(
    position_ids: torch.Tensor, config: QWenConfig, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary angles. (Su et al. 2021; base stretched by `alpha`, Qwen v1)

    position_ids: (B, T) int; alpha: (B, 1) float, 1 up to `seq_length`. Returns two (B, 1, T, C) float32.
    """
    dim = int(config.kv_channels * config.rotary_pct)
    base = config.rotary_emb_base * alpha.float() ** (dim / (dim - 2))  # (B, 1)
    exponent = torch.arange(0, dim, 2, device=position_ids.device).float() / dim  # (C/2,)
    inverse_frequency = 1.0 / base**exponent  # (B, C/2)
    angles = position_ids[..., None].float() * inverse_frequency[:, None]  # (B, T, C/2)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates (B, H, T, C) in fp32, pairing channel i with channel i + C/2."""
    dim = cos.shape[-1]
    rotated, rest = x[..., :dim].float(), x[..., dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated.type_as(x), rest), dim=-1) if rest.shape[-1] else rotated.type_as(x)
