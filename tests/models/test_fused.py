"""Fused element-wise work computes what the plain functions do, forward and backward."""

import shutil

import pytest
import torch
from shapes import batch_of, newer_model, small_model

from trainer.engine import checkpoint_activations, fuse_elementwise
from trainer.errors import ConfigError
from trainer.freeze import freeze

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.parametrize("frozen", [["vision_tower", "language_model"], ["vision_tower"]], ids=["align", "instruct"])
def test_loss_and_gradients_are_those_of_the_plain_functions(frozen):
    model = small_model()
    freeze(model, frozen)
    found = []
    for every in (0, 0, 2):
        if found:
            fuse_elementwise(model)
        checkpoint_activations(model, every)
        for packed in (True, False):
            torch.manual_seed(1)
            inputs, _ = batch_of(model, packed)
            model.zero_grad()
            loss = model(**inputs, loss_only=True, use_cache=False).loss
            loss.backward()
            found.append([loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, fused in zip(found[:2] * 2, found[2:], strict=True):
        assert len(plain) == len(fused) > 4
        for expected, own in zip(plain, fused, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)
    # That it was the fused functions that ran: they round otherwise somewhere.
    assert any(not torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_batches_that_teach_one_token_or_none_compile_nothing():
    model = small_model()
    freeze(model, ["vision_tower", "language_model"])
    fuse_elementwise(model)
    inputs, _ = batch_of(model, packed=True)
    taught = (inputs["labels"] != -100).nonzero()

    def loss_of(tokens: int) -> torch.Tensor:
        labels = torch.full_like(inputs["labels"], -100)
        labels[0, taught[:tokens, 1]] = 5
        loss = model(**inputs | {"labels": labels}, loss_only=True, use_cache=False).loss
        loss.backward()
        return loss.detach()

    loss_of(40)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert [bool(loss_of(tokens)) for tokens in (0, 1, 2, 30)] == [False, True, True, True]


def test_a_model_of_which_nothing_can_be_fused_is_refused():
    fuse_elementwise(small_model())
    with pytest.raises(ConfigError, match=r"model.fuse_elementwise: only .* Qwen \(v1\)"):
        fuse_elementwise(newer_model())
