"""Floating-point operations of a training step, by part of the model.

Counted are matrix products, at two operations for a multiplication and an addition; everything else is below one
percent at real sizes. A linear layer of P positions costs 2·P·in·out in the forward pass, the same again for the
gradient of its input, where that is wanted, and the same for the gradient of its weight, where that trains. So a frozen
layer with something trained before it costs twice its forward pass, a trained one three times. (Kaplan et al. 2020,
section 2.1; PaLM, Chowdhery et al. 2022, appendix B, for what MFU counts) LoRA adds two narrow trained layers.

Of Qwen (v1) the last layer counts, behind its attention, where something is supervised: it is computed nowhere else.
Causal attention counts the half of the square that is needed: 2·A·S² for a document of S tokens and heads A channels
wide together. What activation checkpointing computes a second time is kept apart: MFU leaves it out, HFU counts it.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trainer.errors import ConfigError
from trainer.models.modeling_mqwen import MQWenLMHeadModel
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration, norms_before


@dataclass(frozen=True)
class BatchShape:
    """How much there is in a micro-batch, or on average in one; counts may be means."""

    tokens: float
    """Positions that are computed."""
    squares: float
    """Sum of the squared lengths of what attends to itself: rows, or the documents of packs."""
    images: float
    supervised: float
    """Positions with a label to predict: those the head runs at, and the end of a layer that `ends_early`."""
    packed: bool = False
    """One row of documents, without padding."""

    def __post_init__(self) -> None:
        assert 0 <= self.supervised <= self.tokens <= self.squares

    @classmethod
    def padded(cls, rows: int, width: int, images: float, supervised: float) -> "BatchShape":
        """Rows padded to a common width."""
        return cls(rows * width, rows * width**2, images, supervised)

    def __mul__(self, rows: float) -> "BatchShape":
        """So many rows like this one."""
        return BatchShape(
            rows * self.tokens, rows * self.squares, rows * self.images, rows * self.supervised, self.packed
        )

    def __add__(self, other: "BatchShape") -> "BatchShape":
        """Both together."""
        return BatchShape(
            self.tokens + other.tokens, self.squares + other.squares, self.images + other.images,
            self.supervised + other.supervised, self.packed,
        )  # fmt: skip

    @property
    def width(self) -> float:
        """Tokens of the tensors' second dimension."""
        return self.tokens if self.packed else self.squares / self.tokens


@dataclass(frozen=True)
class Flops:
    """Operations of forward and backward pass."""

    tower: float
    projector: float
    linear: float
    """The language model's linear layers, its head left out."""
    attention: float
    """The language model's attention, at the half of the square."""
    head: float
    recomputed: float
    """A second forward pass by activation checkpointing; not in the total."""

    @property
    def total(self) -> float:
        """What the loss and its gradients need: the numerator of MFU."""
        return self.tower + self.projector + self.linear + self.attention + self.head


def trains(*modules: nn.Module) -> bool:
    """Whether any parameter of these modules does."""
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def is_recomputed(layer: int, every: int) -> bool:
    """Whether activation checkpointing of every k-th layer (0: of none) recomputes the one of this number."""
    return every > 0 and layer % every == 0


@dataclass(frozen=True)
class Layer:
    """What a pre-norm transformer layer multiplies with, whether a language model's or a tower's."""

    norm_1: Any
    projections: list[nn.Linear]
    """To query, key and value."""
    output: nn.Linear
    norm_2: Any
    wide: list[nn.Linear]
    """Into the width of the MLP."""
    narrow: nn.Linear
    """Out of it."""
    head_norms: list[Any] = field(default_factory=list)
    """Of the heads' queries and keys; most models have none."""
    ends_early: bool = False
    """Whether it computes, behind its attention, only the supervised positions."""

    @property
    def trains(self) -> bool:
        attention = [*self.projections, *self.head_norms, self.output]
        return trains(self.norm_1, *attention, self.norm_2, *self.wide, self.narrow)

    @property
    def channels(self) -> int:
        """Of all heads together; keys and values of grouped queries have fewer."""
        return self.output.in_features

    @property
    def key_channels(self) -> int:
        """Of the keys of all heads together, and of the values."""
        fused = len(self.projections) == 1
        return self.channels if fused else self.projections[1].out_features

    def needs_grad(self, reached: bool) -> tuple[bool, bool, bool, bool]:
        """Whether a gradient is wanted of what goes into the projections, into the attention (and out of it), into the
        wide layers and into the narrow one. reached: of what goes into the layer."""
        projections = reached or trains(self.norm_1)
        attention = projections or trains(*self.projections, *self.head_norms)
        wide = attention or trains(self.output, self.norm_2)
        return projections, attention, wide, wide or trains(*self.wide)


@dataclass(frozen=True)
class Decoder:
    """What a language model computes with."""

    embedding: Any
    layers: list[Layer]
    norm: Any
    head: Any
    """May be tied to the embedding."""


def decoder_of(model: MQWenForConditionalGeneration) -> Decoder:
    """Raises ConfigError for layers that are neither Qwen's (v1) nor built as Llama's, as those of Qwen2 and Qwen3."""
    language_model: Any = model.language_model
    embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    if isinstance(language_model, MQWenLMHeadModel):
        text = language_model.transformer
        return Decoder(embedding, [_qwen_layer(block, block is text.h[-1]) for block in text.h], text.ln_f, head)
    text = language_model.get_decoder()
    try:
        return Decoder(embedding, [_llama_layer(layer) for layer in text.layers], text.norm, head)
    except AttributeError as error:
        kind = model.config.text_config.model_type
        raise ConfigError(
            f"a '{kind}' can be trained, but not planned: its layers are unlike Qwen's ({error})"
        ) from error


def _qwen_layer(block: Any, ends_early: bool) -> Layer:
    attn, mlp = block.attn, block.mlp
    return Layer(
        block.ln_1, [attn.c_attn], attn.c_proj, block.ln_2, [mlp.w1, mlp.w2], mlp.c_proj, ends_early=ends_early
    )


def _llama_layer(layer: Any) -> Layer:
    attn, mlp = layer.self_attn, layer.mlp
    projections = [attn.q_proj, attn.k_proj, attn.v_proj]
    head_norms = [getattr(attn, name) for name in ("q_norm", "k_norm") if hasattr(attn, name)]
    return Layer(
        layer.input_layernorm, projections, attn.o_proj, layer.post_attention_layernorm,
        [mlp.gate_proj, mlp.up_proj], mlp.down_proj, head_norms,
    )  # fmt: skip


def tower_layer(layer: Any) -> Layer:
    attn, mlp = layer.self_attn, layer.mlp
    projections = [attn.q_proj, attn.k_proj, attn.v_proj]
    return Layer(layer.layer_norm1, projections, attn.out_proj, layer.layer_norm2, [mlp.fc1], mlp.fc2)


def step_flops(model: MQWenForConditionalGeneration, shape: BatchShape, recompute_every: int = 0) -> Flops:
    """Operations of one forward and backward pass over a batch of this shape.

    model: with what is frozen marked; it may be on the meta device. recompute_every: of `is_recomputed`.
    """
    images = max(1.0, shape.images)  # without an image a blank one is computed
    tower, recomputed = _tower(model, images, recompute_every)
    projector, patches = model.multi_modal_projector, images * model.config.image_context_length
    reached = trains(model.vision_tower)
    projected = _linear(projector.linear_1, patches, reached)
    projected += _linear(projector.linear_2, patches, reached or trains(projector.linear_1))

    text = decoder_of(model)
    reached = reached or trains(projector, text.embedding)
    linear = attention = 0.0
    for number, layer in enumerate(text.layers):
        square = 2 * layer.channels * shape.squares
        kept = shape.supervised if layer.ends_early else shape.tokens
        of_linear, of_attention, again = _layer(layer, shape.tokens, kept, square, reached)
        linear, attention = linear + of_linear, attention + of_attention
        recomputed += again * is_recomputed(number, recompute_every)
        reached = reached or layer.trains
    head = _linear(text.head, shape.supervised, reached or trains(text.norm))
    return Flops(tower, projected, linear, attention, head, recomputed)


def flops_of_each(model: MQWenForConditionalGeneration, recompute_every: int = 0) -> tuple[float, float, float, float]:
    """What a position, a squared length, an image and a supervised position add to a step's operations, recomputed ones
    included: so many times each are `step_flops`, which takes milliseconds, of any shape with an image."""

    def total(tokens: float, squares: float, images: float, supervised: float) -> float:
        work = step_flops(model, BatchShape(tokens, squares, images, supervised), recompute_every)
        return work.total + work.recomputed

    image, one = total(0, 0, 1, 0), total(1, 1, 1, 0)
    square, supervised = total(1, 2, 1, 0) - one, total(1, 1, 1, 1) - one
    return one - square - image, square, image, supervised


def tower_positions(model: MQWenForConditionalGeneration) -> int:
    """What the tower attends to: patches, and CLIP's class token."""
    return model.vision_tower.embeddings.position_embedding.num_embeddings


def _tower(model: MQWenForConditionalGeneration, images: float, recompute_every: int) -> tuple[float, float]:
    """Operations of the tower, and those of a recomputation."""
    config, tower = model.config.vision_config, model.vision_tower
    patches = model.config.image_context_length
    places = tower_positions(model)
    positions = images * places
    convolution = 2 * images * patches * 3 * config.patch_size**2 * config.hidden_size
    total, recomputed = convolution * (1 + trains(tower.embeddings.patch_embedding)), 0.0
    reached = trains(tower.embeddings, *norms_before(tower))
    for number, layer in enumerate(map(tower_layer, tower.encoder.layers[: model.config.vision_layers_read])):
        square = 4 * layer.channels * places * positions  # every patch sees every other
        linear, attention, again = _layer(layer, positions, positions, square, reached)
        total, recomputed = total + linear + attention, recomputed + again * is_recomputed(number, recompute_every)
        reached = reached or layer.trains
    return total, recomputed


def _layer(layer: Layer, positions: float, kept: float, square: float, reached: bool) -> tuple[float, float, float]:
    """Operations of a layer's linear layers, of its attention, and of a recomputation.

    kept: positions that are computed behind the attention. square: operations of the attention's forward pass. reached:
    a gradient of the layer's input is wanted.
    """
    projections, attention, wide, narrow = layer.needs_grad(reached)
    linear = sum(_linear(module, positions, projections) for module in layer.projections)
    linear += sum(_linear(module, kept, wide) for module in layer.wide)
    linear += _linear(layer.output, kept, attention) + _linear(layer.narrow, kept, narrow)
    # A recomputation ends when the last tensor that was saved is there again: before the MLP's last product.
    again = square + _forward(layer.projections, positions) + _forward([layer.output, *layer.wide], kept)
    again += _forward([layer.narrow], kept) * bool(adapter_of(layer.narrow))  # whose adapter saves something last
    return linear, square * (1 + 2 * attention), again * (narrow or trains(layer.narrow))


def adapter_of(module: nn.Module) -> list[Any]:
    """LoRA's two linear layers, into its rank and out of it, beside a layer that has them."""
    pairs = (getattr(module, name, nn.ModuleDict()) for name in ("lora_A", "lora_B"))
    return [linear for pair in pairs for linear in pair.values()]


def _forward(modules: list[nn.Linear], positions: float) -> float:
    return sum(_product(linear, positions) for module in modules for linear in (module, *adapter_of(module)))


def _product(module: nn.Linear, positions: float) -> float:
    return 2 * positions * module.in_features * module.out_features


def _linear(module: nn.Linear, positions: float, input_needs_grad: bool) -> float:
    """Forward pass, gradient of the input, gradient of the weight."""
    total = _product(module, positions) * (1 + input_needs_grad + module.weight.requires_grad)
    for linear, reached in zip(adapter_of(module), (input_needs_grad, True), strict=False):
        total += _product(linear, positions) * (1 + reached + linear.weight.requires_grad)
    return total
