"""The comparisons compare like with like: the peers' model computes what ours does, and differences stop them."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from shapes import batch_of, small_model

from trainer.freeze import freeze

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))


@pytest.mark.parametrize("frozen", [["vision_tower", "language_model"], ["vision_tower"]], ids=["align", "instruct"])
def test_transformers_llava_has_our_loss_and_gradients(frozen):
    from arms import as_llava, llava_names

    model = small_model(vision_feature_layer=-2)
    freeze(model, frozen)
    peer = as_llava(model).train()
    inputs, _ = batch_of(model, packed=False)
    ours = model(**inputs, loss_only=True, use_cache=False).loss
    theirs = peer(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), use_cache=False).loss
    ours.backward()
    theirs.backward()
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)
    parameters = dict(peer.named_parameters())
    trained = set()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad if parameter.requires_grad else torch.zeros_like(parameter)
        for new, expected in llava_names(name, gradient, 256):
            assert parameters[new].requires_grad == parameter.requires_grad, name
            if parameter.requires_grad:
                trained.add(new)
                torch.testing.assert_close(parameters[new].grad, expected, rtol=1e-4, atol=1e-6)
    assert trained == {name for name, parameter in parameters.items() if parameter.requires_grad}


def test_arms_that_do_not_train_the_same_stop_the_comparison():
    from rounds import gate

    step = {"loss": 2.0, "grad_norm": 1.0}
    gate(["a", "b"], [[step], [{"loss": 2.0001, "grad_norm": 1.001}]])
    for other in ({"loss": 2.01}, {"grad_norm": 1.3}, {"loss": math.nan}, {"grad_norm": math.nan}):
        with pytest.raises(SystemExit, match="do not train the same"):
            gate(["a", "b"], [[step], [step | other]])


def test_growth_is_that_over_the_whole_run_and_blind_to_pauses():
    from slope import growth

    steady = np.full(2000, 0.1)
    steady[::97] = 3.0  # the machine was away
    assert abs(growth(steady)) < 0.001
    assert growth(np.linspace(0.1, 0.12, 2000)) == pytest.approx(0.02 / 0.11, rel=0.05)
