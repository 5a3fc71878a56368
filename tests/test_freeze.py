"""What a pattern freezes, by name, and what is said about a pattern that cannot be meant."""

import pytest
import torch
from transformers import CLIPVisionConfig, Qwen2Config

from trainer.errors import ConfigError
from trainer.freeze import PARTS, freeze, part_of, table
from trainer.models.configuration_mqwen_vl import MQWenVLConfig
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration


@pytest.fixture
def model() -> MQWenForConditionalGeneration:
    """Twelve layers of Qwen, so that layer 1 is also a beginning of 10 and 11, and three of CLIP. Without weights."""
    text = QWenConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, kv_channels=8, intermediate_size=24
    )
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
    )
    with torch.device("meta"):
        return MQWenForConditionalGeneration(MQWenVLConfig(text, vision, image_token_id=49))


QWEN_LAYER = ["ln_1.weight", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "ln_2.weight",
              "mlp.w1.weight", "mlp.w2.weight", "mlp.c_proj.weight"]  # fmt: skip
CLIP_LAYER = [
    f"{module}.{kind}"
    for module in ("layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
                   "layer_norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")
]  # fmt: skip
PROJECTOR = [f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]


def qwen_layers(*numbers: int) -> set[str]:
    return {f"language_model.transformer.h.{n}.{name}" for n in numbers for name in QWEN_LAYER}


def clip_layers(*numbers: int) -> set[str]:
    return {f"vision_tower.encoder.layers.{n}.{name}" for n in numbers for name in CLIP_LAYER}


QWEN = qwen_layers(*range(12)) | {
    f"language_model.{name}" for name in ("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight")
}


UNREAD = {f"vision_tower.post_layernorm.{kind}" for kind in ("weight", "bias")}
"""CLIP's norm for its class token: frozen always."""


def frozen(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("projector", set(PROJECTOR)),
        ("language_model", QWEN),
        ("language_model.layers.0-3", qwen_layers(0, 1, 2, 3)),  # both ends
        ("language_model.layers.1-1", qwen_layers(1)),  # and not 10 and 11
        ("language_model.layers.10-11", qwen_layers(10, 11)),
        ("vision_tower.layers.0-1", clip_layers(0, 1)),
        (r"\.ln_[12]\.", {name for name in QWEN if ".ln_1." in name or ".ln_2." in name}),
        (r"h\.(4|5)\.attn\.c_proj", {f"language_model.transformer.h.{n}.attn.c_proj.weight" for n in (4, 5)}),
        ("wte", {"language_model.transformer.wte.weight"}),
    ],
)
def test_pattern_freezes_exactly(model, pattern, expected):
    freeze(model, [pattern])
    assert frozen(model) == expected | UNREAD


def test_part_vision_tower_is_all_of_clip(model):
    freeze(model, ["vision_tower"])
    assert frozen(model) == {f"vision_tower.{name}" for name, _ in model.vision_tower.named_parameters()}
    assert clip_layers(0, 1, 2) < frozen(model)


def test_patterns_add_up(model):
    freeze(model, ["language_model.layers.0-9", "language_model.layers.8-10", "wte", "projector"])
    expected = qwen_layers(*range(11)) | {"language_model.transformer.wte.weight", *PROJECTOR}
    assert frozen(model) == expected | UNREAD


def test_without_patterns_all_trains_that_is_read(model, caplog):
    caplog.set_level("INFO", "trainer")
    freeze(model, [])
    assert frozen(model) == UNREAD
    assert (
        "16 parameters of the vision tower do not train: nothing reads what lies behind hidden state -1" in caplog.text
    )
    caplog.clear()
    model.requires_grad_(True)
    model.config.vision_feature_layer = -2
    freeze(model, ["language_model"])
    assert frozen(model) == QWEN | UNREAD | clip_layers(2)
    assert "548 parameters" in caplog.text  # a layer's 532 and the norm
    caplog.clear()
    freeze(model, ["vision_tower"])  # of which nothing trains: no news
    assert not caplog.text


def test_bad_patterns_and_nothing_left_are_reported_together(model):
    patterns = ["vision_tower", "language_model", "multi_modal", "adapter", "language_model.layers.5-2",
                "projector.layers.0-1"]  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        freeze(model, patterns)
    found = str(raised.value)
    assert found.startswith("freeze: ")
    assert "'adapter' matches no parameter" in found
    assert "'language_model.layers.5-2' matches no parameter" in found
    assert "'projector.layers.0-1' matches no parameter" in found
    assert "everything is frozen" in found
    assert "written vision_tower, projector, language_model, language_model.layers.0-11" in found
    assert found.count("matches no parameter") == 3


def test_everything_frozen_is_a_mistake(model):
    with pytest.raises(ConfigError, match=r"'vision_towr' matches no parameter \(did you mean 'vision_tower'\?\)"):
        freeze(model, ["vision_towr"])
    with pytest.raises(ConfigError, match="everything is frozen: nothing is left to train"):
        freeze(model, list(PARTS))
    with pytest.raises(ConfigError, match="everything is frozen"):
        freeze(model, ["."])


def test_every_parameter_belongs_to_one_part(model):
    modules = {"vision_tower": model.vision_tower, "projector": model.multi_modal_projector,
               "language_model": model.language_model}  # fmt: skip
    counts = dict.fromkeys(modules, 0)
    for name, _ in model.named_parameters():
        counts[part_of(name)] += 1
    assert counts == {part: len(list(module.parameters())) for part, module in modules.items()}


def test_table_counts_parameters(model):
    freeze(model, ["vision_tower", "language_model.layers.0-9", "lm_head"])
    # Qwen: a layer has norms 2 x 16, c_attn 16 x 48 + 48, c_proj 16 x 16, MLP 3 x 16 x 12 = 1680; embedding and head
    # 50 x 16 = 800 each, last norm 16. 12 x 1680 + 1600 + 16 = 21,776; training 2 x 1680 + 800 + 16 = 4,176.
    # Projector: 8 x 16 + 16 + 16 x 16 + 16 = 416.
    # CLIP: a layer has norms 4 x 8, attention 4 x (8 x 8 + 8), MLP 8 x 12 + 12 + 12 x 8 + 8 = 532; class token 8,
    # patches 3 x 4 x 4 x 8 = 384, places (4 + 1) x 8 = 40, two norms 32. 3 x 532 + 464 = 2,060.
    head, *rows = (line.split() for line in table(model).splitlines())
    assert head == ["part", "parameters", "trained"]
    assert rows == [
        ["vision_tower", "2,060", "0"],
        ["projector", "416", "416"],
        ["language_model", "21,776", "4,176"],
        ["total", "24,252", "4,592"],
    ]


def test_layers_of_newer_language_models_are_called_alike(model):
    text = Qwen2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        newer = MQWenForConditionalGeneration(MQWenVLConfig(text, model.config.vision_config, image_token_id=49))
    freeze(newer, ["language_model.layers.1-10", "embed_tokens"])
    trained = {name for name, p in newer.named_parameters() if p.requires_grad and name.startswith("language_model.")}
    layer = ("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
             "mlp.down_proj.weight", "self_attn.o_proj.weight",
             *(f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")))  # fmt: skip
    ends = {f"language_model.model.layers.{i}.{name}" for i in (0, 11) for name in layer}
    assert trained == ends | {"language_model.model.norm.weight"}
    assert not newer.language_model.lm_head.weight.requires_grad  # it is the embedding's
    with pytest.raises(ConfigError, match="there is no layer 12"):
        freeze(newer, ["language_model.layers.11-12"])
