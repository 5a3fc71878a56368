"""Activation checkpointing changes memory and time, and nothing that is computed."""

import pytest
import torch
from shapes import batch_of, newer_model, small_model

from trainer.config import Config
from trainer.engine import checkpoint_activations
from trainer.flops import BatchShape
from trainer.freeze import freeze
from trainer.memory import States
from trainer.recomputation import planned_recomputation, recompute_every
from trainer.rows import Rows

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


def test_every_k_th_layer_is_recomputed_of_those_with_a_backward_pass():
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


def test_layers_of_a_kind_that_cannot_be_planned_are_all_recomputed():
    model, states, shape = newer_model(), States(0, 0, 0, 0, 0), BatchShape.padded(2, 256, 2, 40)
    assert recompute_every(model, states, shape, 1e12) == 0
    del model.language_model.model.layers[1].mlp.gate_proj
    assert recompute_every(model, states, shape, 1e12) == 1


@pytest.mark.parametrize("setting", ["auto", True, False, 2])
def test_a_batch_that_by_the_plan_does_not_fit_is_told_of_before_the_first_step(caplog, setting):
    model, states, shape = small_model(), States(10**6, 0, 0, 0, 0), BatchShape.padded(2, 256, 2, 40)
    with caplog.at_level("WARNING", logger="trainer"):
        assert planned_recomputation(model, states, shape, setting, 1e12) == (0 if setting == "auto" else setting)
    assert not caplog.text
    with caplog.at_level("WARNING", logger="trainer"):
        assert planned_recomputation(model, states, shape, setting, 10**6) == (1 if setting == "auto" else setting)
    assert "of the 0.95 MiB that its GPU has for tensors, and may run out of them" in caplog.text


def test_a_budget_of_tokens_may_be_full_of_the_rows_with_most_pictures(tiny_run):
    widest = BatchShape.padded(1, 2048, 2, 500)
    rows = Rows(widest, widest, images_a_token=1 / 300, padding=0, epoch_size=None, last_step=None, known=[])
    of_rows = Config.load(tiny_run, ["train.micro_batch_size=4"], world_size=1)
    assert rows.largest_batch(of_rows) == widest * 4
    of_tokens = Config.load(tiny_run, ["train.micro_batch_tokens=8192"], world_size=1)
    assert rows.largest_batch(of_tokens).tokens == 8192
    assert rows.largest_batch(of_tokens).images == pytest.approx(8192 / 300)
