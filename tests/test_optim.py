"""Parameter groups, and the learning rate as a function of the step."""

import math

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig

from trainer.config import OptimConfig
from trainer.freeze import freeze
from trainer.models.configuration_mqwen_vl import MQWenVLConfig
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.optim import build_optimizer, parameter_groups, schedule, set_learning_rates

CONFIG = OptimConfig(learning_rate=1e-2, projector_learning_rate=1e-1, weight_decay=0.5)


@pytest.fixture
def model() -> MQWenForConditionalGeneration:
    text = QWenConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, kv_channels=8, intermediate_size=24
    )
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = MQWenForConditionalGeneration(MQWenVLConfig(text, vision, image_token_id=49))
    with torch.no_grad():  # biases start at zero, where decay would not show
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model


FREEZES = [[], ["vision_tower"], ["vision_tower", "language_model"], ["projector", "language_model.layers.0-1"]]


@pytest.mark.parametrize("patterns", FREEZES, ids=str)
def test_groups_hold_every_trainable_parameter_once(model, patterns):
    freeze(model, patterns)
    grouped = [id(p) for group in parameter_groups(model, CONFIG) for p in group["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    assert len(set(grouped)) == len(grouped)


def decaying(model: nn.Module) -> set[str]:
    """Independently of shapes: the weights of linear maps, convolutions and embeddings."""
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)}


def test_norms_and_biases_do_not_decay_and_the_projector_has_its_own_rate(model):
    # Where gradients are zero, AdamW only decays: a step multiplies a weight by 1 - rate x 0.5, which is 0.995 at
    # 0.01, and 0.95 at the projector's 0.1.
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(parameter_groups(model, CONFIG), CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decays = decaying(model)
    assert {"vision_tower.embeddings.patch_embedding.weight", "multi_modal_projector.linear_1.weight",
            "language_model.transformer.wte.weight", "language_model.lm_head.weight"} < decays  # fmt: skip
    for name, parameter in model.named_parameters():
        factor = 1.0 if name not in decays else 0.95 if name.startswith("multi_modal_projector.") else 0.995
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=lambda m, n=name: f"{n}: {m}")
    undecayed = {name.split(".")[-2] for name in before.keys() - decays}
    assert {"ln_1", "ln_f", "linear_1", "c_attn", "layer_norm1"} < undecayed


def test_projector_takes_the_general_rate_where_it_has_none(model):
    groups = parameter_groups(model, OptimConfig(learning_rate=3e-4))
    assert {group["peak_lr"] for group in groups} == {3e-4}


def test_projector_rate_of_zero_is_a_rate(model):
    groups = parameter_groups(model, OptimConfig(learning_rate=3e-4, projector_learning_rate=0.0))
    assert {group["part"]: group["lr"] for group in groups} == {
        "vision_tower": 3e-4, "projector": 0.0, "language_model": 3e-4,
    }  # fmt: skip


def test_betas_reach_the_optimizer(model):
    config = OptimConfig(betas=[0.8, 0.888])
    optimizer = build_optimizer(parameter_groups(model, config), config)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.888)}


def test_rates_are_set_by_part(model):
    freeze(model, ["vision_tower"])
    optimizer = build_optimizer(parameter_groups(model, CONFIG), CONFIG)
    for factor in (0.5, 0.1):  # of the peak, not of the rate before
        expected = {"language_model": 1e-2 * factor, "projector": 1e-1 * factor}
        assert set_learning_rates(optimizer, factor) == pytest.approx(expected)
        assert len(optimizer.param_groups) == 4  # two parts, each with and without decay
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected[group["part"]])


# 100 steps, the first 0.1 x 100 = 10 of them warm-up, so the fall is 90 steps long.
COS_30 = 0.5 * (1 + math.sqrt(3) / 2)


@pytest.mark.parametrize(
    ("kind", "step", "factor"),
    [
        *[(kind, step, (step + 1) / 10) for kind in ("cosine", "linear", "constant") for step in (0, 4, 9)],
        ("cosine", 10, 1.0),
        ("cosine", 25, COS_30),  # a sixth of the fall: (1 + cos 30 deg) / 2
        ("cosine", 55, 0.5),
        ("cosine", 100, 0.0),
        ("linear", 10, 1.0),
        ("linear", 40, 2 / 3),
        ("linear", 55, 0.5),
        ("linear", 99, 1 / 90),  # the last step taken still moves
        ("linear", 100, 0.0),
        *[("constant", step, 1.0) for step in (10, 55, 100)],
    ],
)
def test_schedule_at_hand_computed_steps(kind, step, factor):
    config = OptimConfig(warmup_ratio=0.1, schedule=kind)
    assert schedule(step, 100, config) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "last_step", "expected"),
    [
        (0.0, 4, [1.0, 0.75, 0.5, 0.25]),
        (0.3, 4, [0.5, 1.0, 1.0, 0.5]),  # 1.2 steps of warm-up are two
        (1.0, 4, [0.25, 0.5, 0.75, 1.0]),
        (0.03, 1, [1.0]),
    ],
)
def test_whole_schedules_of_short_runs(ratio, last_step, expected):
    config = OptimConfig(warmup_ratio=ratio, schedule="linear")
    assert [schedule(step, last_step, config) for step in range(last_step)] == pytest.approx(expected)
