"""Vision tower, projector and language model joined: what reaches the language model, what trains, what is saved.

The parts are tiny but real: a CLIPVisionModel of 12-pixel pictures in 4-pixel patches, so (12 / 4)^2 = 9 features.
"""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from trainer.models.configuration_mqwen_vl import MQWenVLConfig
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_mqwen import MQWenLMHeadModel
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.models.modeling_qwen import QWenLMHeadModel

X = 300
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def tiny_tower() -> CLIPVisionModel:
    torch.manual_seed(4)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=12, patch_size=4
    )
    return CLIPVisionModel(config).eval()


def join(language_model, **settings) -> MQWenForConditionalGeneration:
    model = MQWenForConditionalGeneration.from_parts(tiny_tower(), language_model, image_token_id=X, **settings)
    return model.eval()


@pytest.fixture
def model(tiny_model) -> MQWenForConditionalGeneration:
    """The joined model. Its projector is enlarged: at its initial 0.01 the pictures would hardly show in the logits."""
    model = join(tiny_model)
    with torch.no_grad():
        for parameter in model.multi_modal_projector.parameters():
            parameter.mul_(30).add_(0.01)
    return model


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(5))


INPUT_IDS = torch.tensor([[11, X, 12, X, 13], [14, 15, X, 16, 17]])
TEXT_IDS = torch.tensor([[11, 12, 13, 14, 15], [16, 17, 18, 19, 20]])


def project(model, patches: torch.Tensor) -> torch.Tensor:
    """The projector in plain functions."""
    one, two = model.multi_modal_projector.linear_1, model.multi_modal_projector.linear_2
    hidden = torch.nn.functional.gelu(patches @ one.weight.T + one.bias)
    return hidden @ two.weight.T + two.bias


@torch.no_grad()
def test_layer_minus_1_is_the_last_hidden_state_without_its_class_token(model):
    expected = project(model, model.vision_tower(pictures(2)).last_hidden_state[:, 1:])
    features = model.get_image_features(pictures(2))
    assert features.shape == (2, 9, 64)
    torch.testing.assert_close(features, expected, **TOLERANCE)


@torch.no_grad()
def test_layer_minus_2_is_the_hidden_state_before_the_last_layer(tiny_model):
    model = join(tiny_model, vision_feature_layer=-2)
    # As Transformers has it, and by a tower that ends there: the last layer is not run.
    expected = model.vision_tower(pictures(2), output_hidden_states=True).hidden_states[-2]
    ran = []
    model.vision_tower.encoder.layers[-1].register_forward_hook(lambda *_: ran.append(1))
    features = model.get_image_features(pictures(2))
    torch.testing.assert_close(features, project(model, expected[:, 1:]), **TOLERANCE)
    assert not ran
    model.config.vision_feature_layer = -1
    assert not torch.allclose(model.get_image_features(pictures(2)), features)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, -1])
def test_any_layer_is_as_transformers_has_it_and_what_lies_behind_is_known(tiny_model, layer):
    model = join(tiny_model, vision_feature_layer=layer)
    expected = model.vision_tower(pictures(2), output_hidden_states=True).hidden_states[layer]
    before = model.get_image_features(pictures(2))
    torch.testing.assert_close(before, project(model, expected[:, 1:]), **TOLERANCE)
    unread = model.unread_parameters()
    for name, parameter in model.vision_tower.named_parameters():
        saved = parameter.clone()
        parameter.add_(torch.randn_like(parameter))
        is_unread = torch.equal(model.get_image_features(pictures(2)), before)
        assert is_unread == (f"vision_tower.{name}" in unread), name
        parameter.copy_(saved)


@torch.no_grad()
def test_logits_are_those_of_the_language_model_given_the_features(model):
    features = model.get_image_features(pictures(3))
    expected = model.language_model(INPUT_IDS, features, labels=INPUT_IDS)
    output = model(INPUT_IDS, pictures(3), labels=INPUT_IDS)
    assert output.logits.shape == (2, 5 + 2 * 8, 320)  # each image: one placeholder -> nine features
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    assert not torch.allclose(model(INPUT_IDS, pictures(3).flip(0)).logits, output.logits, atol=1e-3)


@pytest.mark.parametrize("count", [None, 2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_wrong_number_of_pictures_is_an_error(model, count, training):
    pixel_values = None if count is None else pictures(count)
    with pytest.raises(ValueError, match=f"{count or 0} images for 3 places"):
        model.train(training)(INPUT_IDS, pixel_values)


@pytest.mark.parametrize("pixel_values", [None, torch.empty(0, 3, 12, 12)], ids=["None", "no rows"])
@pytest.mark.parametrize("loss_only", [False, True])
def test_a_batch_without_pictures_trains_like_the_language_model_alone(model, pixel_values, loss_only):
    # It still runs every part, on a blank picture: a rank that skips one hangs ZeRO-3 and aborts ZeRO-2. What it adds
    # is zero, to the loss and to the gradients, and zero is not None.
    model.train()
    expected = model.language_model(TEXT_IDS, labels=TEXT_IDS).loss
    expected.backward()
    alone = {name: p.grad.clone() for name, p in model.language_model.named_parameters()}
    model.zero_grad()
    runs = []
    model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    loss = model(TEXT_IDS, pixel_values, labels=TEXT_IDS, loss_only=loss_only).loss
    loss.backward()
    assert loss.isfinite()
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    assert runs == [1]
    for name, parameter in model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    for name, parameter in model.language_model.named_parameters():
        torch.testing.assert_close(parameter.grad, alone[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_text_in_evaluation_does_not_run_the_tower(model):
    model.vision_tower.register_forward_hook(lambda *_: pytest.fail("the tower ran"))
    assert torch.equal(model(TEXT_IDS).logits, model.language_model(TEXT_IDS).logits)


def test_return_dict_false_gives_a_tuple_without_pictures_too(model):
    loss, logits = model.train()(TEXT_IDS, labels=TEXT_IDS, return_dict=False)
    output = model(TEXT_IDS, labels=TEXT_IDS)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


def test_stage_1_trains_the_projector_through_a_frozen_language_model(model):
    model.train().requires_grad_(False)
    model.multi_modal_projector.requires_grad_(True)
    model(INPUT_IDS, pictures(3), labels=INPUT_IDS).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("multi_modal_projector."):
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_projector_gradient_is_the_slope_of_the_loss(model):
    # (loss(w + e) - loss(w - e)) / 2e along the gradient's own direction is the gradient's norm.
    weight = model.multi_modal_projector.linear_1.weight
    model(INPUT_IDS, pictures(3), labels=INPUT_IDS).loss.backward()
    direction, step = weight.grad / weight.grad.norm(), 1e-2
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            weight.add_(direction, alpha=sign * step)
            losses.append(model(INPUT_IDS, pictures(3), labels=INPUT_IDS).loss.item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(weight.grad.norm().item(), rel=0.01)


@pytest.mark.parametrize("frozen", [True, False])
def test_only_a_training_tower_keeps_a_graph(model, frozen):
    model.train()
    model.vision_tower.requires_grad_(not frozen)
    seen = []
    model.vision_tower.register_forward_hook(lambda _, args, output: seen.append(output.last_hidden_state))
    # Even where something upstream asks for gradients, as an adapter's input hook does.
    features = model.get_image_features(pictures(2).requires_grad_())
    assert seen[0].requires_grad is not frozen
    assert features.requires_grad  # the projector trains
    features.square().sum().backward()
    gradients = [p.grad for name, p in model.vision_tower.named_parameters() if "post_layernorm" not in name]
    assert all((g is None) is frozen for g in gradients)


@torch.no_grad()
def test_save_and_load_give_equal_logits(model, tmp_path):
    model.config.vision_feature_layer = -2
    model.config.image_aspect = "pad"
    expected = model(INPUT_IDS, pictures(3)).logits
    model.save_pretrained(tmp_path)
    again, info = MQWenForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not again.training
    assert torch.equal(again(INPUT_IDS, pictures(3)).logits, expected)
    assert (again.config.vision_feature_layer, again.config.image_aspect) == (-2, "pad")
    assert again.config.image_token_id == X
    assert again.config.image_context_length == 9
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    original = model.state_dict()
    assert all(torch.equal(weight, original[name]) for name, weight in again.state_dict().items())


@torch.no_grad()
def test_language_model_saves_as_plain_qwen(model, tmp_path):
    model.language_model.save_pretrained(tmp_path)
    qwen, info = QWenLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(qwen.config) is QWenConfig
    assert torch.equal(qwen(TEXT_IDS).logits, model.language_model(TEXT_IDS).logits)


def test_generation_with_pictures_equals_generation_with_their_features(model):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        features = model.get_image_features(pictures(3))
    expected = model.language_model.generate(INPUT_IDS, images=features, **settings)
    assert torch.equal(model.generate(INPUT_IDS, pixel_values=pictures(3), **settings), expected)
    text = model.generate(TEXT_IDS, pixel_values=torch.empty(0, 3, 12, 12), **settings)
    assert torch.equal(text, model.language_model.generate(TEXT_IDS, **settings))


@pytest.mark.parametrize("saved", [False, True])
def test_joined_model_stops_where_its_generation_config_says(model, tmp_path, saved):
    # 6 tokens unless the third one ends the text, which generation_config.json says (config.json does not).
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    free = model.generate(INPUT_IDS[:1], pixel_values=pictures(2), **settings)
    end = free[0, 5 + 2].item()
    expected = free[:, : free[0].tolist().index(end, 5) + 1]
    assert expected.shape[1] <= 5 + 3 < free.shape[1]
    model.generation_config.eos_token_id = end
    if saved:
        model.save_pretrained(tmp_path)
        model = MQWenForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(model.generate(INPUT_IDS[:1], pixel_values=pictures(2), **settings), expected)


def projector_weights(model) -> list[torch.Tensor]:
    return [p.detach() for p in model.multi_modal_projector.parameters()]


def test_projector_starts_from_its_seed_alone(tiny_config):
    language_model = MQWenLMHeadModel(tiny_config)
    first = projector_weights(join(language_model, seed=7))
    torch.manual_seed(123)
    torch.rand(99)
    again = projector_weights(join(language_model, seed=7))
    other = projector_weights(join(language_model, seed=8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    weight_1, bias_1, weight_2, bias_2 = first
    assert not torch.equal(weight_1, other[0])
    assert not torch.equal(weight_1.flatten()[:99], weight_2.flatten()[:99])
    # N(0, 0.01) of 64 x 64 values: the standard deviation is known to 0.01 / sqrt(2 x 4096), about 1%.
    assert weight_2.std().item() == pytest.approx(0.01, rel=0.05)
    assert weight_2.mean().abs() < 5e-4
    assert not bias_1.any()
    assert not bias_2.any()


def test_projector_in_bf16_is_the_rounded_projector(tiny_config):
    exact = projector_weights(join(MQWenLMHeadModel(tiny_config), seed=7))
    rounded = projector_weights(join(MQWenLMHeadModel(tiny_config).bfloat16(), seed=7))
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a.bfloat16(), b)


def test_joining_draws_no_random_numbers_and_copies_no_weights(tiny_model):
    # Two stages that load the same parts must find the generator where they left it.
    tower = tiny_tower()
    before = torch.get_rng_state()
    model = MQWenForConditionalGeneration.from_parts(tower, tiny_model, image_token_id=X)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.vision_tower is tower
    assert model.language_model is tiny_model
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_dtype_trains_end_to_end(tiny_model, dtype):
    model = join(tiny_model).to(dtype).train()
    # Pixels arrive as the loader makes them, in fp32.
    loss = model(INPUT_IDS, pictures(3), labels=INPUT_IDS, loss_only=True).loss
    loss.backward()
    assert loss.isfinite()
    assert {p.grad.dtype for p in model.multi_modal_projector.parameters()} == {dtype}


# --- Sizes ---

SIZES = {
    # Embedding and head: 2 x 151,936 x 2048. A layer: c_attn 3 x 2048^2 + 3 x 2048 (bias), c_proj 2048^2, MLP
    # 3 x 2048 x 5504, two norms 2 x 2048. Last norm 2048. 622,329,856 + 24 x 50,604,032 + 2048.
    "Qwen-1.8B": (
        {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 11008},
        1_836_828_672,
    ),
    # 1,244,659,712 + 32 x 202,395,648 + 4096.
    "Qwen-7B": (
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 22016},
        7_721_324_544,
    ),
}


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("sizes", "expected"), SIZES.values(), ids=SIZES)
def test_parameter_counts_are_the_published_ones(sizes, expected):
    with torch.device("meta"):
        assert count(MQWenLMHeadModel(QWenConfig(**sizes))) == expected


def test_parameter_count_of_the_whole_model():
    clip = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    config = MQWenVLConfig(QWenConfig(**SIZES["Qwen-1.8B"][0]), CLIPVisionConfig(**clip, patch_size=14, image_size=224))
    assert config.image_context_length == 256
    with torch.device("meta"):
        model = MQWenForConditionalGeneration(config)
    assert count(model.vision_tower) == 303_179_776
    # 1024 x 2048 + 2048 and 2048 x 2048 + 2048
    assert count(model.multi_modal_projector) == 2_099_200 + 4_196_352
    assert count(model) == 303_179_776 + 6_295_552 + 1_836_828_672
