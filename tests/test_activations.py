"""Activation bytes against what autograd really saves: every distinct storage that it keeps, parameters apart."""

import pytest
import torch
from shapes import SIZES, batch_of, small_model

from trainer.activations import activation_bytes
from trainer.freeze import freeze

FROZEN = {
    "align": ["vision_tower", "language_model"],
    "instruct": ["vision_tower"],
    "instruct, head and embedding frozen": ["vision_tower", "wte", "lm_head"],
    "upper layers": ["vision_tower", "language_model.layers.0-1", "wte"],
    "upper layers, projector frozen": ["vision_tower", "projector", "language_model.layers.0-1", "wte"],
    "everything trains": ["post_layernorm"],
    "the tower alone": ["projector", "language_model"],
}


def saved_bytes(model, inputs) -> int:
    """What a forward pass keeps for the backward pass."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no storage takes the place of another

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned and storage.nbytes():
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs, loss_only=True, use_cache=False).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FROZEN)
def test_bytes_are_those_that_autograd_keeps(name, dtype, checkpointing, packed):
    model = small_model(dtype)
    freeze(model, FROZEN[name])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    inputs, shape = batch_of(model, packed)
    expected = activation_bytes(model, shape, checkpointing)
    found = saved_bytes(model, inputs)
    if checkpointing:  # the rotary tables are held by what will recompute the layers, out of sight of autograd
        found += 2 * 4 * SIZES["kv_channels"] * int(shape.width)
    assert found == pytest.approx(expected.saved + expected.loss, rel=0.03)
