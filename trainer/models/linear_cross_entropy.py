"""Cross-entropy of a linear head over the supervised positions, in chunks.

The logits of a 151,936-word vocabulary are the largest tensor of a training step, and most positions (image features,
prompts) carry no label. So: keep the labelled rows only, compute a chunk of logits, take its loss and its gradient at
once, and throw the logits away. Value and gradients equal those of the plain loss.

Shapes: B batch, T tokens, S supervised positions, D hidden size, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
"""Label of a position that is not supervised (the default `ignore_index` of PyTorch's cross-entropy)."""

CHUNK_LOGITS = {False: 1 << 24, True: 1 << 26}
"""Logits per chunk, by whether the head trains: 2**24 are 64 MB in fp32, 110 rows of Qwen's vocabulary; 2**26 are four
times as many. Of a head that trains, every chunk adds to a gradient as large as the head: fewer of them are faster."""


def chunk_rows(vocabulary: int, trains: bool) -> int:
    """Rows whose logits are there at a time. trains: the head does."""
    return max(1, CHUNK_LOGITS[trains] // vocabulary)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `hidden @ weight.T`, divided. The gradients are made in the forward pass, chunk by
    chunk, and there, in fp32, they get what of the divisor is no power of two: rounded to bf16 it would be an error
    common to all."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, divisor):
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Chunks of the head's gradient are summed in fp32: in bf16 late chunks would vanish against the sum.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        mantissa, ctx.exponent = math.frexp(divisor)
        rows = chunk_rows(weight.shape[0], grad_weight is not None)
        for start in range(0, hidden.shape[0], rows):
            chunk, target = hidden[start : start + rows], labels[start : start + rows, None]
            logits = (chunk @ weight.t()).float()  # (rows, V)
            # All in the memory of the logits, where PyTorch's own logsumexp would take as much again.
            highest, of_target = logits.amax(-1, keepdim=True), logits.gather(-1, target)
            total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
            loss += (total.log() + highest - of_target).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad = logits.div_(total.mul_(mantissa))  # softmax
            grad.scatter_add_(-1, target, grad.new_full(target.shape, -1 / mantissa))
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None and grad.dtype == grad_weight.dtype:
                torch.addmm(grad_weight, grad.t(), chunk, out=grad_weight)
            elif grad_weight is not None:
                grad_weight += grad.t() @ chunk
            del logits, grad  # before the next chunk's are made
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss / divisor

    @staticmethod
    def backward(ctx, grad_loss):
        # In place: nobody else has them, and a second backward pass would be told so by PyTorch.
        scale = grad_loss * 2.0**-ctx.exponent
        return *(None if g is None else g.mul_(scale.to(g.dtype)) for g in ctx.saved_tensors), None, None


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """labels (B, T) int64, `IGNORE_INDEX` where there is nothing to predict -> the positions that predict a label, in
    the flattened batch (B·T), and what each predicts: both (S,) int64. Position t predicts the label at t + 1."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    positions = (targets != IGNORE_INDEX).nonzero().squeeze(-1)
    return positions, targets.index_select(0, positions)


def at_positions(hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B, T, D) -> (1, S, D): the vectors at positions (S,) of the flattened batch."""
    return hidden_states.flatten(0, 1).index_select(0, positions)[None]


def linear_cross_entropy(
    hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, num_items: int | None = None
) -> torch.Tensor:
    """Cross-entropy of `hidden_states @ weight.T` against `targets`, without the whole logits tensor.

    hidden_states: (1, S, D), float, at the supervised positions.
    weight: (V, D), the head.
    targets: (S,), int64.
    num_items: divisor of the sum, the supervised tokens of the whole step; by default S.
    Returns a float32 scalar. A batch without a label gives 0, with a graph, so that every rank can run backward.
    """
    if not torch.is_grad_enabled():
        weight = weight.detach()  # else the gradient of a trained head would be made in evaluation too
    divisor = max(1, targets.numel() if num_items is None else int(num_items))
    return _LinearCrossEntropy.apply(hidden_states.flatten(0, 1), weight, targets, divisor)
