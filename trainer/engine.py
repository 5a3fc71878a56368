"""The DeepSpeed engine: ZeRO, precision, accumulation and clipping around model and optimizer."""

from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer import deepspeed_json
from trainer.config import Config
from trainer.dist import World, log
from trainer.engine_files import RecordingCheckpointEngine
from trainer.errors import ConfigError, did_you_mean
from trainer.flops import is_recomputed
from trainer.memory import Sharding
from trainer.optim import build_optimizer, parameter_groups
from trainer.paths import find_deepspeed


def deepspeed_settings(config: Config, world: World) -> dict[str, Any]:
    """What the engine gets. Raises ConfigError where DeepSpeed's own reader refuses the ZeRO section."""
    file = find_deepspeed(config.deepspeed)
    settings, _ = deepspeed_json.build(file, config, world.world_size)
    try:
        DeepSpeedZeroConfig(**settings.get("zero_optimization", {}))
    except ValidationError as error:
        lines = [f"deepspeed: {file}: zero_optimization.{_in_words(mistake)}" for mistake in error.errors()]
        raise ConfigError("\n".join(lines)) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"deepspeed: {file}: zero_optimization: {error}") from error
    return settings


def _in_words(mistake: Any) -> str:
    """One of Pydantic's mistakes on a line, with the nearest name for a key that is not known."""
    key = ".".join(map(str, mistake["loc"]))
    if mistake["type"] != "extra_forbidden":
        return f"{key}: {mistake['msg']}, found {mistake['input']!r}"
    hint = did_you_mean(key, DeepSpeedZeroConfig.model_fields)
    return f"{key}: unknown key" + (f"; {hint}" if hint else "")


def build_engine(
    model: PreTrainedModel, config: Config, settings: dict[str, Any], recompute_every: int = 0
) -> deepspeed.DeepSpeedEngine:
    """Wraps a model whose frozen parameters are already marked: what trains is settled here for the engine's life.

    settings: of `deepspeed_settings`. recompute_every: of `checkpoint_activations`.
    """
    checkpoint_activations(model, recompute_every)
    if config.model.fuse_elementwise:
        fuse_elementwise(model)
    groups = parameter_groups(model, config.optim)
    # DeepSpeed fills a bucket of gradients before it reduces them: one for more than there are only takes memory.
    bucket = Sharding.of(model, config.optim, settings, world_size=1).bucket_size  # the same on any number of ranks
    settings = {**settings, "zero_optimization": {**settings["zero_optimization"], "reduce_bucket_size": bucket}}
    optimizer = build_optimizer(groups, config.optim)
    with redirect_stdout(StringIO()):  # of ZeRO-1 in bf16 it prints the memory at every turn
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.checkpoint_engine = RecordingCheckpointEngine(engine.checkpoint_engine)
    # It would put scripts into each checkpoint, which is data, and on a full disk fail on rank 0 alone.
    engine._copy_recovery_script = lambda _folder: None
    return engine


def forget_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """After a step that was skipped: what DeepSpeed keeps of its gradients.

    With an offloaded optimizer, ZeRO-1 and 2 in bf16 would keep the sums in fp32, and add to them in every later step.
    (source: DeepSpeed 0.19.8, `DeepSpeedZeroOptimizer._optimizer_step` after an overflow)
    """
    if engine.zero_optimization_stage() < 3 and engine.zero_cpu_offload():
        kept = engine.optimizer.averaged_gradients
        kept.update(dict.fromkeys(kept))


def fuse_elementwise(model: PreTrainedModel) -> None:
    """Has norms, rotary embedding and gates computed in one pass each. Raises ConfigError if nothing of the model
    can."""
    able = [module for module in model.modules() if hasattr(module, "fused")]
    if not able:
        raise ConfigError("model.fuse_elementwise: only language models of Qwen (v1) can; leave it out")
    for module in able:
        module.fused = True
    log.info("model.fuse_elementwise: compiled in the first step, which may take half a minute")


def checkpoint_activations(model: Any, every: int) -> None:
    """Has every k-th layer of tower and language model recompute its activations in the backward pass; 0: none.

    Not by the switch of Transformers, which makes the outputs of all embeddings want a gradient: it would run through
    frozen layers to the first. The non-reentrant kind does without. Layers with nothing to train at or before them keep
    nothing anyway.
    """
    has_backward = False
    for part in (model.vision_tower, model.multi_modal_projector, model.language_model):
        number = 0
        for module in part.modules():  # in the order in which they compute
            is_layer = isinstance(module, GradientCheckpointingLayer)
            has_backward |= any(p.requires_grad for p in module.parameters(recurse=is_layer))
            if is_layer:
                module.gradient_checkpointing = has_backward and is_recomputed(number, every)
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
                number += 1


def full_weights(engine: deepspeed.DeepSpeedEngine, trained: bool) -> dict[str, torch.Tensor]:
    """The weights that are trained, or those that are frozen, whole, on the CPU: on rank 0, elsewhere an empty dict.
    Every rank must call this.

    Raises RuntimeError if a tensor is not of its parameter's shape.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad != trained:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if engine.global_rank == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
                if weights[name].shape != shape:
                    raise RuntimeError(f"{name} was gathered as {tuple(weights[name].shape)}, not {tuple(shape)}")
    return weights
