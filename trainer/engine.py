"""The DeepSpeed engine: ZeRO, precision, accumulation and clipping around model and optimizer."""

import deepspeed
import torch
from transformers import PreTrainedModel

from trainer import deepspeed_json
from trainer.config import Config, find_deepspeed
from trainer.dist import World
from trainer.optim import build_optimizer, parameter_groups


def build_engine(model: PreTrainedModel, config: Config, world: World) -> deepspeed.DeepSpeedEngine:
    """Wraps a model whose frozen parameters are already marked: what trains is settled here for the engine's life."""
    settings, _ = deepspeed_json.build(find_deepspeed(config.deepspeed), config, world.world_size)
    if config.model.activation_checkpointing:
        # Non-reentrant: the reentrant kind finds no gradient where a layer's input needs none.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = parameter_groups(model, config.optim)
    optimizer = build_optimizer(groups, config.optim, deepspeed_json.offloads_optimizer(settings))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def full_state_dict(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """All weights, whole, on the CPU: on rank 0, elsewhere an empty dict. Every rank must call this.

    Raises RuntimeError if a tensor is not of its parameter's shape.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if engine.global_rank == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
                if weights[name].shape != shape:
                    raise RuntimeError(f"{name} was gathered as {tuple(weights[name].shape)}, not {tuple(shape)}")
    return weights
