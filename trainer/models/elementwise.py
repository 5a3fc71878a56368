"""Element-wise work of Qwen's layers, and how it is done in one pass over its tensors."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm, computed in fp32 and scaled in the input's dtype. (Zhang & Sennrich 2019)"""
    x = hidden_states.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x.type_as(hidden_states) * weight


def gated(up: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """What goes through a gated MLP. (SwiGLU, Shazeer 2020)"""
    return up * F.silu(gate)


@cache
def one_pass(function: Callable) -> Callable:
    """An element-wise function in one pass over its tensors, forward and backward, compiled when first called: what
    modules whose `fused` is set use in training."""
    compiled = torch.compile(function, dynamic=True)

    def called(first: torch.Tensor, *others):
        # PyTorch would compile anew for a single position, or none: the last layer of a batch that teaches one token.
        return (compiled if first.shape[-2] > 1 else function)(first, *others)

    return called
