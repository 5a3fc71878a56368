"""In which layers activations are recomputed in the backward pass, where that is left to the plan."""

from contextlib import suppress
from typing import Literal

from trainer.activations import activation_bytes
from trainer.dist import log
from trainer.errors import ConfigError
from trainer.flops import BatchShape
from trainer.memory import States, format_bytes
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration

SPARSEST = 8
"""Every eighth layer: fewer save little."""


def recompute_every(
    model: MQWenForConditionalGeneration,
    states: States,
    batch: BatchShape,
    room: float,
    setting: bool | int | Literal["auto"] = "auto",
) -> int:
    """Layers whose activations are recomputed, as in `is_recomputed`: as set by `model.activation_checkpointing`, or in
    how few they must be for a batch to fit into so many bytes of a rank's accelerator: every k-th, of `SPARSEST` on; 0:
    in none; 1: in all, which may not be enough either, or is what is left where layers are of a kind that cannot be
    planned."""
    if setting != "auto":
        return int(setting)
    try:
        fitting = (n for n in (0, *range(SPARSEST, 1, -1)) if states.total(activation_bytes(model, batch, n)) <= room)
        return next(fitting, 1)
    except ConfigError:
        return 1


def planned_recomputation(
    model: MQWenForConditionalGeneration,
    states: States,
    batch: BatchShape,
    setting: bool | int | Literal["auto"],
    room: float,
) -> int:
    """As `recompute_every`; warns where by the plan a batch does not fit."""
    every = recompute_every(model, states, batch, room, setting)
    with suppress(ConfigError):  # layers of a kind that cannot be planned
        planned = states.total(activation_bytes(model, batch, every))
        if planned > room:
            log.warning(
                "by the plan a rank takes up to %s of the %s that its GPU has for tensors, and may run out of them: "
                "launch/plan.py says what fits", format_bytes(planned), format_bytes(room),
            )  # fmt: skip
    return every


def in_words(every: int) -> str:
    """What happens to the activations of the layers."""
    return {0: "kept", 1: "recomputed"}.get(every, f"recomputed in one layer of {every}")
