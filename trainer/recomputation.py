"""In which layers activations are recomputed in the backward pass, where that is left to the plan."""

from trainer.activations import activation_bytes
from trainer.errors import ConfigError
from trainer.flops import BatchShape
from trainer.memory import States
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration

SPARSEST = 8
"""Every eighth layer: fewer save little."""


def recompute_every(model: MQWenForConditionalGeneration, states: States, batch: BatchShape, room: float) -> int:
    """In how few layers activations must be recomputed for a batch to fit into so many bytes of a rank's accelerator:
    every k-th, of `SPARSEST` on; 0: in none; 1: in all, which may not be enough either, or is what is left where layers
    are of a kind that cannot be planned."""
    try:
        fitting = (n for n in (0, *range(SPARSEST, 1, -1)) if states.total(activation_bytes(model, batch, n)) <= room)
        return next(fitting, 1)
    except ConfigError:
        return 1


def in_words(every: int) -> str:
    """What happens to the activations of the layers."""
    return {0: "kept", 1: "recomputed"}.get(every, f"recomputed in one layer of {every}")
