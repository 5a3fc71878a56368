"""FLOP formulas against what PyTorch's own counter sees of a forward and backward pass.

The counter knows matrix products and convolutions, but neither the CPU's fused attention nor that a causal kernel skips
half of the square. So attention runs by the "math" kernel here, whose products the counter sees, over the whole square:
expected is the formula's total and once more its attention.
"""

import pytest
import torch
from shapes import SIZES, add_lora, batch_of, full_model, newer_model, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.engine import checkpoint_activations
from trainer.flops import BatchShape, step_flops
from trainer.freeze import freeze

FROZEN = {
    "align": ["vision_tower", "language_model"],
    "instruct": ["vision_tower"],
    "upper layers": ["vision_tower", "projector", "language_model.layers.0-1", "wte"],
    "everything trains": [],
    "upper half of the tower": ["embeddings", "pre_layrnorm", "vision_tower.layers.0-0"],
    "the tower alone": ["projector", "language_model"],
    "the head alone": ["vision_tower", "projector", "transformer"],
    "LoRA": ["vision_tower"],
    "LoRA alone, dropping out": ["vision_tower", "projector"],
}


def counted(model, inputs) -> float:
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(**inputs, loss_only=True, use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("every", [0, 1, 3], ids=["kept", "recomputed", "a third recomputed"])
@pytest.mark.parametrize("name", FROZEN)
def test_flops_are_those_that_are_counted(name, every, packed):
    model = small_model()
    add_lora(model, name)
    freeze(model, FROZEN[name])
    checkpoint_activations(model, every)
    inputs, shape = batch_of(model, packed)
    found = counted(model, inputs)
    expected = step_flops(model, shape, every)
    # A recomputation does the whole square too. Layers under the lowest trained one have no backward pass.
    layers = range(SIZES["num_hidden_layers"])[2 if name == "upper layers" else 4 if name == "the head alone" else 0 :]
    recomputed = sum(every > 0 and layer % every == 0 for layer in layers)
    again = recomputed * 2 * SIZES["hidden_size"] * shape.squares
    assert found == pytest.approx(expected.total + expected.attention + expected.recomputed + again, rel=0.01)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("frozen", [["vision_tower", "language_model"], []], ids=str)
def test_flops_of_newer_parts_are_those_that_are_counted(frozen, packed):
    model = newer_model()
    freeze(model, frozen)
    inputs, shape = batch_of(model, packed)
    expected = step_flops(model, shape)
    assert counted(model, inputs) == pytest.approx(expected.total + expected.attention, rel=0.01)


@pytest.mark.parametrize("name", ["align", "instruct", "everything trains"])
def test_each_part_is_counted_by_itself(name):
    model = small_model()
    freeze(model, FROZEN[name])
    inputs, shape = batch_of(model, packed=False)
    expected = step_flops(model, shape)
    pixel_values, ids, labels = inputs["pixel_values"], inputs["input_ids"], inputs["labels"]
    patches, width = model.config.image_context_length, model.config.vision_config.hidden_size

    def of(part, *args, grad: bool = True, **kwargs) -> float:
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(grad):
            output = part(*args, **kwargs)
            output = getattr(output, "last_hidden_state", getattr(output, "loss", output))
            if grad:
                output.sum().backward()
        return counter.get_total_flops()

    tower_trains = name == "everything trains"
    assert of(model.vision_tower, pixel_values, grad=tower_trains) == pytest.approx(expected.tower, rel=0.01)
    features = torch.randn(2, patches, width, requires_grad=tower_trains)
    assert of(model.multi_modal_projector, features) == pytest.approx(expected.projector, rel=0.01)
    images = torch.randn(2, patches, SIZES["hidden_size"], requires_grad=True)
    found = of(model.language_model, ids, images, labels=labels, loss_only=True, use_cache=False)
    assert found == pytest.approx(expected.linear + 2 * expected.attention + expected.head, rel=0.01)


def test_a_feature_layer_in_the_middle_ends_the_tower_there():
    found, expected = [], []
    for layer in (-1, -2):
        model = small_model(vision_feature_layer=layer)
        freeze(model, [])
        inputs, shape = batch_of(model, packed=False)
        found.append(counted(model, inputs))
        expected.append(step_flops(model, shape).total)
    # Both passes of one of the tower's layers, a few hundredths of the whole.
    assert found[0] - found[1] == pytest.approx(expected[0] - expected[1], rel=0.01)
    assert expected[0] > expected[1]


# The field's formulas, written out by hand for one sample of 256 + 256 tokens, all text supervised: CLIP-ViT-L forward
# 0.155 TFLOP; linear layers 2·512·24·(4·2048² + 3·2048·5504) = 1.243, attention 2·24·2048·512² = 0.026, head
# 2·256·2048·151936 = 0.159. Frozen 2·(1.243 + 0.159) + 3·0.026, trained 3·(1.243 + 0.159 + 0.026).
PUBLISHED = {("Qwen-1.8B", "frozen"): 3.05e12, ("Qwen-1.8B", "trained"): 4.46e12,
             ("Qwen-7B", "frozen"): 14.3e12, ("Qwen-7B", "trained"): 21.3e12}  # fmt: skip


@pytest.mark.parametrize(("size", "mode"), PUBLISHED)
def test_real_sizes_give_the_figures_of_the_field_notes(size, mode):
    model = full_model(size)
    freeze(model, FROZEN["align" if mode == "frozen" else "instruct"])
    found = step_flops(model, BatchShape.padded(1, 512, images=1, supervised=256))
    # The notes count the whole last layer; it ends at the supervised positions.
    width, mlp = model.config.text_config.hidden_size, model.config.text_config.intermediate_size // 2
    left_out = (2 if mode == "frozen" else 3) * 2 * 256 * (width**2 + 3 * width * mlp)
    assert found.total + left_out == pytest.approx(PUBLISHED[size, mode], rel=0.01)
