"""Bytes that a forward pass keeps for the backward pass, and what either needs beside them for a while.

What each operation keeps is read off PyTorch's derivatives: a linear layer its input, if its weight trains; a product
both factors; SiLU its input; fused attention query, key, value, output and a log-sum for each head; the norms in fp32.
With everything trained in bf16 a layer of Qwen keeps 16·D + 12·A + 8·F bytes a token (hidden size D, heads A channels
wide together, MLP F wide): 101 KB in Qwen-1.8B, and 74 KB where the weights are frozen and gradients only pass through.

Counted is what CPU and CUDA keep alike: for packed rows CUDA's kernel keeps up to 3·A values a token less, and of
dropout a byte a value.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer.flops import BatchShape, Layer, adapter_of, clip_layer, layers_read, qwen_layer, trains
from trainer.models.linear_cross_entropy import CHUNK_LOGITS
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration

FP32 = 4
"""Bytes of a value that is computed in fp32 whatever the model's type: norms, log-sums, rotary angles, loss."""


@dataclass(frozen=True)
class Activations:
    """Bytes."""

    saved: float
    """Kept by tower, projector and language model from the forward to the backward pass."""
    loss: float
    """Kept by the loss: the gradients it has made already, of the supervised positions and of a head that trains."""
    recomputed: float
    """With activation checkpointing: what one layer at a time keeps, while it is computed again."""
    logits: float
    """For a while: the logits of a chunk in two types, and the sum of the head's gradient."""
    norm: float
    """For a while: what the backward pass of a norm makes in fp32, the first time while all layers are still kept."""
    mlp: float
    """For a while: gradients of the activations of an MLP."""

    @property
    def working(self) -> float:
        """The most that is there for a while only: logits, last norm and last layer have their turns."""
        return max(self.logits, self.norm, self.recomputed + self.mlp)

    @property
    def peak(self) -> float:
        return self.saved + self.loss + self.working


def activation_bytes(
    model: MQWenForConditionalGeneration, shape: BatchShape, checkpointing: bool = False
) -> Activations:
    """What a batch of this shape takes. model: with what is frozen marked, in the type it trains in; may be on meta."""
    size = model.multi_modal_projector.linear_1.weight.element_size()
    images = max(1.0, shape.images)  # without an image a blank one is computed
    tower, tower_layer = _tower(model, images, size, checkpointing)
    projector = _projector(model, images, size)
    text, head = model.language_model.transformer, model.language_model.lm_head
    width, vocabulary = head.in_features, head.out_features
    reached = trains(model.vision_tower, model.multi_modal_projector, text.wte) or checkpointing

    saved = shape.tokens * (8 * trains(text.wte) + 1)  # the ids to look up, and where the images go
    saved += 2 * FP32 * model.config.text_config.kv_channels * shape.width  # cosines and sines, the same in all layers
    layers, heads = [], model.config.text_config.num_attention_heads
    for layer in map(qwen_layer, text.h):
        layers.append(shape.tokens * _qwen_layer(layer, heads, size, reached, shape.packed))
        reached = reached or layer.trains
    if checkpointing:  # the layers' inputs; and a frozen embedding's output, which is made to want a gradient
        saved += shape.tokens * size * width * (len(layers) + (not trains(text.wte)))
    else:
        saved += sum(layers)
    saved += shape.tokens * _rms_norm(text.ln_f, size, reached)
    reached = reached or trains(text.ln_f)

    last = qwen_layer(text.h[-1])
    head_values = vocabulary * width * trains(head)
    chunk = min(shape.supervised, max(1, CHUNK_LOGITS // vocabulary)) * vocabulary
    return Activations(
        saved=tower + projector + saved,
        loss=size * shape.supervised * width * reached + 8 * shape.supervised + size * head_values,
        recomputed=max(tower_layer, *layers) if checkpointing else 0.0,
        logits=2 * FP32 * chunk + (FP32 + size) * head_values,
        norm=5 * FP32 * shape.tokens * width * reached,
        # Of three branches; but what the last product of a trained one keeps is gone by then.
        mlp=size * shape.tokens * last.narrow.in_features * (3 - trains(last.narrow)) * reached,
    )


def _rms_norm(norm: Any, size: int, reached: bool) -> float:
    """Bytes a token: input and root in fp32; what the weight scales, if that trains."""
    width = norm.weight.numel()
    return FP32 * (width + 1) * reached + size * width * trains(norm)


def _layer_norm(norm: Any, size: int, reached: bool) -> float:
    """Bytes a token: input, mean and root."""
    return (size * norm.weight.numel() + 2 * FP32) * (reached or trains(norm))


def _qwen_layer(layer: Layer, heads: int, size: int, reached: bool, packed: bool) -> float:
    """Bytes a token. reached: a gradient of the layer's input is wanted."""
    _, attention, wide, narrow = layer.needs_grad(reached)
    channels, mlp = layer.channels, layer.narrow.in_features
    saved = _rms_norm(layer.norm_1, size, reached) + _rms_norm(layer.norm_2, size, attention or trains(layer.output))
    saved += _input(layer.projections, size, reached) + _input(layer.wide, size, wide)
    # Rotated query and key, the fused projection (the value is a view of it), output, log-sums.
    saved += (6 * size * channels + FP32 * heads) * attention
    # Packed, the documents' outputs are put together once more for the projection; else the attention keeps them.
    output = _input([layer.output], size, attention, kept_anyway=attention and not packed)
    return saved + output + 3 * size * mlp * narrow + _input([layer.narrow], size, narrow)


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


def _clip_layer(layer: Layer, heads: int, size: int, reached: bool) -> float:
    """Bytes a position. reached: a gradient of the layer's input is wanted."""
    _, attention, wide, narrow = layer.needs_grad(reached)
    width, mlp = layer.output.out_features, layer.narrow.in_features
    saved = _layer_norm(layer.norm_1, size, reached)
    saved += _layer_norm(layer.norm_2, size, attention or trains(layer.output))
    saved += size * width * (trains(*layer.projections) + trains(*layer.wide))
    saved += (4 * size * width + FP32 * heads) * attention  # query, key, value, output, log-sums
    saved += size * width * trains(layer.output) * (not attention)
    return saved + size * mlp * (2 * narrow + trains(layer.narrow))  # of quick GELU both factors


def _tower(model: MQWenForConditionalGeneration, images: float, size: int, checkpointing: bool) -> tuple[float, float]:
    """Bytes that the tower keeps, and those of a layer that is recomputed. A frozen tower keeps nothing."""
    tower, config = model.vision_tower, model.config.vision_config
    if not trains(tower):
        return 0.0, 0.0
    positions = images * (model.config.image_context_length + 1)
    saved = images * 3 * config.image_size**2 * size * trains(tower.embeddings.patch_embedding)
    reached = trains(tower.embeddings) or checkpointing
    saved += positions * _layer_norm(tower.pre_layrnorm, size, reached)
    reached, layers = reached or trains(tower.pre_layrnorm), []
    for layer in map(clip_layer, tower.encoder.layers[: layers_read(model)]):
        layers.append(positions * _clip_layer(layer, config.num_attention_heads, size, reached))
        reached = reached or layer.trains
    if checkpointing:
        return saved + positions * size * config.hidden_size * len(layers), max(layers, default=0.0)
    return saved + sum(layers), 0.0


def _projector(model: MQWenForConditionalGeneration, images: float, size: int) -> float:
    """Bytes that the projector keeps: the inputs of its layers, and of GELU."""
    projector, patches = model.multi_modal_projector, images * model.config.image_context_length
    first, second = projector.linear_1, projector.linear_2
    reached = trains(model.vision_tower, first)
    return size * patches * (first.in_features * trains(first) + second.in_features * (reached + trains(second)))
