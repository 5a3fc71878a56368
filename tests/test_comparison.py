"""The comparisons compare like with like: the peers' model computes what ours does, and differences stop them."""

import math
import re
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
    from llava import as_llava, llava_names

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


def test_arms_that_do_not_train_the_same_are_named():
    from rounds import Arm, differences

    def arms(*steps: dict) -> dict[str, Arm]:
        made = zip("ab", steps, strict=True)
        return {name: Arm(name, Path(), [{"steps": [step, of_arm]}]) for name, of_arm in made}

    step = {"loss": 2.0, "grad_norm": 1.0}
    assert not differences(arms(step, {"loss": 2.0001, "grad_norm": 1.001}))
    for other in ({"loss": 2.01}, {"grad_norm": 1.3}, {"loss": math.nan}, {"grad_norm": math.nan}):
        (line,) = differences(arms(step | other, step))
        assert re.search(rf"do not train the same: step 2 of 'a' and of 'b': {next(iter(other))} ", line)


def test_an_arm_that_ends_or_takes_too_long_is_named_with_its_words(tmp_path):
    from rounds import ArmError, compare

    with pytest.raises(ArmError, match=r"arm 'ours' has ended:[^¶]*no-such\.yaml"):
        compare(["ours"], tmp_path / "no-such.yaml", 1, 1, 1)
    with pytest.raises(ArmError, match="arm 'ours' was not done in time"):
        compare(["ours"], tmp_path / "no-such.yaml", 1, 1, 1, ends=0.0)


def test_arms_of_a_kind_fail_alone_or_are_left_for_want_of_time(tmp_path):
    from rounds import Arm, one_by_one

    done, failures = one_by_one(["ours", "hf"], tmp_path / "no-such.yaml", 1, 1, 1, math.inf)
    assert not done
    assert [re.match(r"arm '(\w+)' has ended:[^¶]*no-such\.yaml", failure)[1] for failure in failures] == ["ours", "hf"]
    assert one_by_one(["ours", "hf"], tmp_path / "no-such.yaml", 1, 1, 1, 0.0) == ({}, [])
    unasked = Arm("ours", tmp_path / "no-such.yaml")
    unasked.start()
    process = unasked.process
    process.stdin.close()
    assert process.wait(120) == 0  # it has loaded nothing, and says nothing
    unasked.stop()


def test_growth_is_that_over_the_whole_run_and_blind_to_pauses():
    from slope import growth

    steady = np.full(2000, 0.1)
    steady[::97] = 3.0  # the machine was away
    assert abs(growth(steady)) < 0.001
    assert growth(np.linspace(0.1, 0.12, 2000)) == pytest.approx(0.02 / 0.11, rel=0.05)
