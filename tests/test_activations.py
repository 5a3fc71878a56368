"""Activation bytes against what autograd really saves: every distinct storage that it keeps, parameters apart."""

import pytest
import torch
from shapes import SIZES, add_lora, batch_of, full_model, newer_model, small_model

from trainer.activations import activation_bytes
from trainer.engine import checkpoint_activations
from trainer.flops import BatchShape
from trainer.freeze import freeze
from trainer.measure import LiveBytes

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.long)
"""Slow on a CPU without instructions for it."""

FROZEN = {
    "align": ["vision_tower", "language_model"],
    "instruct": ["vision_tower"],
    "instruct, head and embedding frozen": ["vision_tower", "wte", "lm_head"],
    "upper layers": ["vision_tower", "language_model.layers.0-1", "wte"],
    "upper layers, projector frozen": ["vision_tower", "projector", "language_model.layers.0-1", "wte"],
    "everything trains": [],
    "the tower alone": ["projector", "language_model"],
    "LoRA": ["vision_tower"],
    "LoRA alone, dropping out": ["vision_tower", "projector"],
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
@pytest.mark.parametrize("every", [0, 1, 3], ids=["kept", "recomputed", "a third recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FROZEN)
def test_bytes_are_those_that_autograd_keeps(name, dtype, every, packed):
    model = small_model(dtype)
    add_lora(model, name)
    freeze(model, FROZEN[name])
    checkpoint_activations(model, every)
    inputs, shape = batch_of(model, packed)
    expected = activation_bytes(model, shape, every)
    found = saved_bytes(model, inputs)
    if every == 1:
        # Out of sight of autograd: the rotary tables are held by what will recompute the layers.
        found += 2 * 4 * SIZES["kv_channels"] * int(shape.width)
    assert found == pytest.approx(expected.saved + expected.loss, rel=0.03)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("every", [0, 1], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["align", "instruct"])
def test_peak_is_that_of_all_tensors_that_are_alive(name, dtype, every, packed):
    model = small_model(dtype)
    freeze(model, FROZEN[name])
    checkpoint_activations(model, every)
    inputs, shape = batch_of(model, packed, width=512, rows=4)
    for parameter in model.parameters():  # gradients are planned apart; DeepSpeed takes them away too
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with LiveBytes() as live:
        before = live.peak
        model(**inputs, loss_only=True, use_cache=False).loss.backward()
    expected = activation_bytes(model, shape, every)
    planned = expected.peak - expected.inputs  # which were there before
    assert 0.95 * planned <= live.peak - before <= planned


def test_a_layer_of_a_real_size_keeps_the_bytes_of_the_field_notes():
    # 16·D + 12·A + 8·F bytes a token at D = A = 2048, F = 5504 in bf16; frozen 8·D + 12·A + 6·F.
    for frozen, kept in (([], 101_376), (["language_model"], 73_984)):
        model = full_model("Qwen-1.8B").bfloat16()
        freeze(model, ["vision_tower", *frozen])
        found = activation_bytes(model, BatchShape.padded(1, 1024, images=1, supervised=1024)).saved / 1024
        assert found / 24 == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("frozen", [["vision_tower", "language_model"], ["vision_tower"], []], ids=str)
def test_bytes_of_newer_parts_are_those_that_autograd_keeps(frozen, packed):
    for dtype in (torch.float32, torch.bfloat16):
        model = newer_model(dtype)
        freeze(model, frozen)
        inputs, shape = batch_of(model, packed)
        expected = activation_bytes(model, shape)
        assert saved_bytes(model, inputs) == pytest.approx(expected.saved + expected.loss, rel=0.03), dtype
