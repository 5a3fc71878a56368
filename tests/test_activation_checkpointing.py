"""Activation checkpointing changes memory and time, and nothing that is computed."""

import pytest
import torch
from shapes import batch_of, small_model

from trainer.engine import checkpoint_activations
from trainer.freeze import freeze

FROZEN = {"align": ["vision_tower", "language_model"], "instruct": ["vision_tower"],
          "upper layers": ["vision_tower", "projector", "language_model.layers.0-1", "wte"]}  # fmt: skip


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("name", FROZEN)
def test_recomputed_layers_give_the_same_gradients(name, every):
    model = small_model()
    freeze(model, FROZEN[name])
    inputs, _ = batch_of(model, packed=True)
    gradients = []
    for n in (0, every):
        checkpoint_activations(model, n)
        model.zero_grad()
        model(**inputs, loss_only=True, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_every_so_manieth_layer_is_recomputed_of_those_with_a_backward_pass():
    model = small_model()
    freeze(model, FROZEN["upper layers"])
    inputs, _ = batch_of(model, packed=False)
    computed = [0] * 4
    for number, block in enumerate(model.language_model.transformer.h):
        block.mlp.register_forward_pre_hook(
            lambda *_, number=number: computed.__setitem__(number, computed[number] + 1)
        )
    checkpoint_activations(model, 2)
    model(**inputs, loss_only=True, use_cache=False).loss.backward()
    # Layers 0 and 2 would be recomputed; but nothing trains up to layer 1.
    assert computed == [1, 1, 2, 1]
