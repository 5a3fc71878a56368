"""Attention over packed documents: causal inside each of them, blind to the others.

T tokens of all documents, H heads (of keys and values perhaps fewer, each for a group of queries), C channels a head.
"""

from typing import Any

import torch
import torch.nn.functional as F

try:
    from torch.nn.attention.varlen import varlen_attn  # CUDA only
except ImportError:
    varlen_attn = None  # type: ignore[assignment]


def check_packed(use_cache, past_key_values, attention_mask, position_ids) -> None:
    """Raises ValueError where a model is given what does not go with packed documents."""
    if use_cache or past_key_values is not None or attention_mask is not None or position_ids is None:
        raise ValueError("packed documents (cu_seq_lens_q) need position_ids, no cache and no attention_mask")


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """query, key, value (1, H, T, C) -> (1, T, H, C); key and value may have a divisor of the query's heads.

    cu_seq_lens: (documents + 1,) int32, where each document starts and the last one ends; max_length: tokens of the
    longest. On CUDA in half precision one kernel takes all documents, elsewhere each gets a call of its own.
    """
    grouped: dict[str, Any] = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    if varlen_attn is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # (T, H, C)
        causal = (-1, 0)  # all tokens on the left, none on the right
        output = varlen_attn(
            query, key, value, cu_seq_lens, cu_seq_lens, max_length, max_length, scale=scaling, window_size=causal,
            **grouped,
        )  # fmt: skip
        return output.unsqueeze(0)  # type: ignore[union-attr]
    lengths = cu_seq_lens.diff().tolist()
    # Split, not sliced: the gradient of each slice would be as long as the row.
    documents = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, **grouped)
        for q, k, v in documents
    ]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)
