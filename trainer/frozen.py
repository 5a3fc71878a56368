"""Frozen weights: watched, so that nothing moves them unseen, and known by a fingerprint at every geometry."""

import hashlib
from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed

from trainer.dist import raise_together
from trainer.errors import CheckpointError

CHUNK = 1 << 22
"""Elements summed up at a time: 32 MiB as int64."""

GOLDEN = -7046029254386353131
"""2^64 divided by the golden ratio, odd: its multiples are spread over all 64 bits. (source: Knuth, TAOCP 3, 6.4)"""


class FrozenWeights:
    """The frozen weights of an engine, as they were when it was built. All ranks call its methods."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        self._engine = engine
        self._sums = _checksums(engine)
        totals = torch.tensor([total for _, total in self._sums.values()], dtype=torch.int64)
        if engine.zero_optimization_stage() == 3:  # each rank has a part of every parameter
            totals = totals.to(engine.device)
            torch.distributed.all_reduce(totals)
        whats = [f"{name} {what}" for name, (what, _) in self._sums.items()]
        listed = [f"{what} {total}" for what, total in zip(whats, totals.tolist(), strict=True)]
        self.fingerprint = hashlib.sha256("\n".join(listed).encode()).hexdigest() if listed else ""
        """Of names, shapes, dtypes and values, the same at any geometry; empty if nothing is frozen."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._sums)

    def check(self) -> None:
        """Raises CheckpointError, on all ranks, where a frozen weight is not what it was."""
        now = _checksums(self._engine)
        moved = [name for name, total in self._sums.items() if now.get(name) != total]
        moved += [f"{name} (frozen since)" for name in now.keys() - self._sums.keys()]
        failure = None
        if moved:
            failure = CheckpointError(
                f"rank {self._engine.global_rank}: {len(moved)} frozen weights are not what they were when training "
                f"began, among them {', '.join(moved[:3])}: nothing is saved. The checkpoints before are as they were; "
                f"something in this process, or its memory, changed what `freeze` holds still"
            )
        raise_together(failure)


def _checksums(engine: deepspeed.DeepSpeedEngine) -> dict[str, tuple[str, int]]:
    """Of each frozen parameter: shape and dtype in words, and the checksum of what this rank has of it."""
    found = {}
    largest = max(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    weights = chunk_weights(min(CHUNK, largest), engine.device)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            # ZeRO-3 cuts a parameter into equal parts, the last one filled up.
            part, shape = parameter.ds_tensor, parameter.ds_shape
            start = engine.global_rank * part.numel()
            values = part.flatten()[: max(0, shape.numel() - start)]
        else:
            values, shape, start = parameter.detach().flatten(), parameter.shape, 0
        found[name] = f"{tuple(shape)} {values.dtype}", checksum(values, start, weights)
    return found


def chunk_weights(length: int, device: torch.device) -> torch.Tensor:
    """Odd numbers spread over 64 bits, one for each place in a chunk."""
    return torch.arange(1, length + 1, dtype=torch.int64, device=device).mul_(GOLDEN).bitwise_or_(1)


def checksum(values: torch.Tensor, start: int, weights: torch.Tensor) -> int:
    """Of a flat tensor that begins at element `start` of its parameter; those of all parts add up (modulo 2^64, signed)
    to that of the whole. An element that changes, or two that change places, change it.

    weights: `chunk_weights` as long as the parameter, or `CHUNK`.
    """
    weights = weights.to(values.device)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits, total = values.detach().view(integers), 0
    for chunk, inside, piece in _chunks(bits, start):
        of_chunk = int((piece.to(torch.int64) * weights[inside : inside + len(piece)]).sum())
        total += of_chunk * (2 * chunk + 1)
    return (total + 2**63) % 2**64 - 2**63


def _chunks(bits: torch.Tensor, start: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(number of a chunk of the parameter, place in it, elements) of what lies there."""
    position, end = start, start + len(bits)
    while position < end:
        chunk, inside = divmod(position, CHUNK)
        step = min(CHUNK - inside, end - position)
        yield chunk, inside, bits[position - start : position - start + step]
        position += step
