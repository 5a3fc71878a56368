"""Bytes that a forward pass keeps for the backward pass, and what either needs beside them for a while.

What each operation keeps is read off PyTorch's derivatives: a linear layer its input, if its weight trains; a product
both factors; SiLU its input; fused attention query, key, value, output and a log-sum for each head; the norms in fp32.
Behind the attention of Qwen's (v1) last layer only supervised positions keep anything.
With everything trained in bf16 a layer of Qwen keeps 16·D + 12·A + 8·F bytes a token (hidden size D, heads A channels
wide together, MLP F wide): 101 KB in Qwen-1.8B, and 74 KB where the weights are frozen and gradients only pass through.

Counted is what CPU and CUDA keep alike: for packed rows CUDA's kernel keeps up to 3·A values a token less, and of
dropout a byte a value.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer.flops import (
    BatchShape,
    Decoder,
    Layer,
    adapter_of,
    decoder_of,
    is_recomputed,
    tower_layer,
    tower_positions,
    trains,
)
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.linear_cross_entropy import chunk_rows
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration, norms_before

FP32 = 4
"""Bytes of a value that is computed in fp32 whatever the model's type: norms, log-sums, rotary angles, loss."""


@dataclass(frozen=True)
class Activations:
    """Bytes."""

    inputs: float
    """The batch itself: pixels as they come and normalised, ids and labels."""
    saved: float
    """Kept by tower, projector and language model from the forward to the backward pass."""
    loss: float
    """Kept by the loss: the gradients it has made already, of the supervised positions and of a head that trains."""
    logits: float
    """For a while: what the head reads, and the logits of a chunk; in bf16 in two types, and there the fp32 sum of the
    head's gradient."""
    last: float
    """For a while, when all layers are kept: what the backward pass of the last norm or layer makes, or that layer's
    forward pass. With activation checkpointing also what the layer keeps, computed again."""
    others: float
    """The same of another layer, less what a last layer that ends early has kept: that is gone by then."""

    @property
    def working(self) -> float:
        """The most that is there for a while only: logits, last layer and the others have their turns."""
        return max(self.logits, self.last, self.others)

    @property
    def peak(self) -> float:
        return self.inputs + self.saved + self.loss + self.working


def activation_bytes(model: MQWenForConditionalGeneration, shape: BatchShape, recompute_every: int = 0) -> Activations:
    """What a batch of this shape takes.

    model: with what is frozen marked, in the type it trains in; may be on meta. recompute_every: of `is_recomputed`.
    """
    size = model.multi_modal_projector.linear_1.weight.element_size()
    images = max(1.0, shape.images)  # without an image a blank one is computed
    tower, of_tower_layer = _tower(model, images, size, recompute_every)
    projector = _projector(model, images, size)
    text, config = decoder_of(model), model.config.text_config
    head, embedding = text.head, text.embedding
    width, vocabulary = head.in_features, head.out_features
    reached = trains(model.vision_tower, model.multi_modal_projector, embedding)

    saved = shape.tokens * (8 * trains(embedding) + 1)  # the ids to look up, and where the images go
    # Cosines and sines, the same in all layers: Qwen v1 keeps them in fp32.
    heads, angle_size = config.num_attention_heads, FP32 if isinstance(config, QWenConfig) else size
    saved += 2 * angle_size * (text.layers[0].channels // heads) * shape.width
    of_layers, last, others = _layers(text, shape, heads, size, angle_size, reached, recompute_every)
    reached = reached or trains(text.norm) or any(layer.trains for layer in text.layers)

    head_values = vocabulary * width * trains(head)
    chunk = min(shape.supervised, chunk_rows(vocabulary, trains(head))) * vocabulary
    other = size * (size != FP32)  # what is in fp32 too, where that is not the model's own type
    # The head's input is computed alone, or taken out of that of all positions.
    read = size * width * (shape.supervised + shape.tokens * (not text.layers[-1].ends_early))
    pixels = images * 3 * model.config.vision_config.image_size**2
    return Activations(
        inputs=pixels * (1 + size) + 2 * 8 * shape.tokens,
        saved=tower + projector + saved + of_layers,
        loss=size * shape.supervised * width * reached + 8 * shape.supervised + size * head_values,
        logits=read + (FP32 + other) * chunk + (FP32 + other) * head_values * (size != FP32),
        last=last,
        others=max(others, of_tower_layer),
    )


def _layers(
    text: Decoder, shape: BatchShape, heads: int, size: int, angle_size: int, reached: bool, recompute_every: int
) -> tuple[float, float, float]:
    """Bytes that the language model's layers and its last norm keep; and for a while, as of `Activations`, those of the
    last layer and of the others."""
    width = text.head.in_features
    norm = 5 * FP32 * width  # bytes a token: what a norm's backward pass makes
    saved = working = others = gone = 0.0
    for number, layer in enumerate(text.layers):
        others = max(others, working)  # of the layer before
        positions = shape.supervised if layer.ends_early else shape.tokens  # behind the attention
        # Outputs of packed documents are put together, and what is read is taken out; else the attention keeps them.
        before, behind = _decoder_layer(layer, heads, size, reached, joined=shape.packed or layer.ends_early)
        of_layer, again = shape.tokens * before + positions * behind, 0.0
        if is_recomputed(number, recompute_every):
            layer_input = shape.tokens * size * width * (reached or layer.trains)
            # In fp32 the first norm keeps that very tensor.
            again, of_layer = of_layer - layer_input * (size == FP32) * reached, layer_input
        saved += of_layer
        if layer.ends_early:
            gone, others = of_layer, max(others, norm * shape.tokens * reached)
        reached = reached or layer.trains
        # Gradients of the residual stream and in three branches; but what the last product of a trained one keeps is
        # gone by then.
        mlp = size * positions * (width + layer.narrow.in_features * (3 - trains(layer.narrow))) * reached
        # Those of the residual stream, of the attention's output, of query, key and value.
        gradients = size * (width + 4 * layer.channels) * reached
        # In the forward pass, before there is an output: what rotates the key; the first layer's input, this one's, and
        # its norm's output, where that is not kept.
        forward = (4 * angle_size - 2 * size) * layer.channels + size * width * (3 - trains(*layer.projections))
        working = again + max(mlp, shape.tokens * max(gradients, forward) - positions * behind)
    saved += positions * _rms_norm(text.norm, size, reached)
    return saved, max(working, norm * positions * (reached or trains(text.norm))), others - gone


def _rms_norm(norm: Any, size: int, reached: bool, heads: int = 1) -> float:
    """Bytes a token: input and root in fp32; what the weight scales, if that trains. heads: vectors a token."""
    width = norm.weight.numel()
    return heads * (FP32 * (width + 1) * reached + size * width * trains(norm))


def _layer_norm(norm: Any, size: int, reached: bool) -> float:
    """Bytes a token: input, mean and root."""
    return (size * norm.weight.numel() + 2 * FP32) * (reached or trains(norm))


def _decoder_layer(layer: Layer, heads: int, size: int, reached: bool, joined: bool) -> tuple[float, float]:
    """Bytes a token, up to the attention and behind it. reached: a gradient of the layer's input is wanted. joined:
    what is projected is a copy of the attention's output."""
    projections, attention, wide, narrow = layer.needs_grad(reached)
    channels, keys, mlp = layer.channels, layer.key_channels, layer.narrow.in_features
    saved = _rms_norm(layer.norm_1, size, reached) + _input(layer.projections, size, reached)
    for norm, of_all in zip(layer.head_norms, (channels, keys), strict=False):
        normed = projections or trains(*layer.projections)
        saved += _rms_norm(norm, size, normed, of_all // norm.weight.numel())
    # Rotated query and key, the value (of a fused projection a view, which keeps the whole), output, log-sums.
    values = 3 * channels if len(layer.projections) == 1 else keys
    saved += (size * (2 * channels + keys + values) + FP32 * heads) * attention
    behind = _input([layer.output], size, attention, kept_anyway=attention and not joined)
    behind += _rms_norm(layer.norm_2, size, attention or trains(layer.output)) + _input(layer.wide, size, wide)
    return saved, behind + 3 * size * mlp * narrow + _input([layer.narrow], size, narrow)


def _input(modules: list[Any], size: int, reached: bool, kept_anyway: bool = False) -> float:
    """Bytes a token of what linear layers keep of their common input, and adapters of what goes through them.

    reached: a gradient of the input is wanted. kept_anyway: the input is.
    """
    width, whole, own = size * modules[0].in_features, False, 0.0
    for module in modules:
        drops = any(
            isinstance(dropout, nn.Dropout) for dropout in getattr(module, "lora_dropout", nn.ModuleDict()).values()
        )
        whole = whole or (trains(module) and not drops)
        own += sum(size * linear.out_features for linear in adapter_of(module)[:1])
        own += width * (1 + reached) * drops  # the input with zeros in it, and what it was multiplied with
    return width * (whole and not kept_anyway) + own


def _tower_layer(layer: Layer, heads: int, size: int, reached: bool, kept: int) -> float:
    """Bytes a position. reached: a gradient of the layer's input is wanted. kept: factors of the activation function
    that it keeps."""
    _, attention, wide, narrow = layer.needs_grad(reached)
    width, mlp = layer.output.out_features, layer.narrow.in_features
    saved = _layer_norm(layer.norm_1, size, reached)
    saved += _layer_norm(layer.norm_2, size, attention or trains(layer.output))
    saved += size * width * (trains(*layer.projections) + trains(*layer.wide))
    saved += (4 * size * width + FP32 * heads) * attention  # query, key, value, output, log-sums
    saved += size * width * trains(layer.output) * (not attention)
    return saved + size * mlp * (kept * narrow + trains(layer.narrow))


def _tower(model: MQWenForConditionalGeneration, images: float, size: int, recompute_every: int) -> tuple[float, float]:
    """Bytes that the tower keeps, and those of a layer that is recomputed. A frozen tower keeps nothing."""
    tower, config = model.vision_tower, model.config.vision_config
    if not trains(tower):
        return 0.0, 0.0
    positions = images * tower_positions(model)
    saved = images * 3 * config.image_size**2 * size * trains(tower.embeddings.patch_embedding)
    reached = trains(tower.embeddings)
    for norm in norms_before(tower):
        saved += positions * _layer_norm(norm, size, reached)
        reached = reached or trains(norm)
    recomputed, kept = 0.0, 2 if config.hidden_act == "quick_gelu" else 1  # quick GELU is a product of two
    for number, layer in enumerate(map(tower_layer, tower.encoder.layers[: model.config.vision_layers_read])):
        of_layer = positions * _tower_layer(layer, config.num_attention_heads, size, reached, kept)
        if is_recomputed(number, recompute_every):
            recomputed = max(recomputed, of_layer)
            of_layer = positions * size * config.hidden_size * (reached or layer.trains)
        saved += of_layer
        reached = reached or layer.trains
    if "vision_tower.post_layernorm.weight" not in model.unread_parameters():
        saved += positions * _layer_norm(tower.post_layernorm, size, reached)
    return saved, recomputed


def _projector(model: MQWenForConditionalGeneration, images: float, size: int) -> float:
    """Bytes that the projector keeps: the inputs of its layers, and of GELU."""
    projector, patches = model.multi_modal_projector, images * model.config.image_context_length
    first, second = projector.linear_1, projector.linear_2
    reached = trains(model.vision_tower, first)
    return size * patches * (first.in_features * trains(first) + second.in_features * (reached + trains(second)))
