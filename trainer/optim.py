"""AdamW's parameter groups, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from trainer.config import OptimConfig
from trainer.freeze import part_of


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """One group for each trained part, and one more for its norms and biases, which do not decay.

    Each has `part`, and `peak_lr`: its rate where the schedule is 1.
    """
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = part_of(name), parameter.ndim > 1
        rate = config.learning_rate
        if part == "projector" and config.projector_learning_rate is not None:
            rate = config.projector_learning_rate
        decay = config.weight_decay if decays else 0.0
        group = {"part": part, "peak_lr": rate, "lr": rate, "weight_decay": decay, "params": []}
        groups.setdefault((part, decays), group)["params"].append(parameter)
    return list(groups.values())


def build_optimizer(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """PyTorch's AdamW in its fused form, vectorised on GPU and CPU alike.

    States offloaded to the host use it too: DeepSpeed's own would have to be compiled at the first start.
    """
    return torch.optim.AdamW(groups, betas=(config.betas[0], config.betas[1]), fused=True)


def schedule(step: int, last_step: int, config: OptimConfig) -> float:
    """Factor of the peak rate at a step, counted from 0: a linear rise over the warm-up, then the fall."""
    warmup = math.ceil(config.warmup_ratio * last_step)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, last_step - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.schedule == "linear" else 1.0


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Sets every group's rate to `factor` of its peak. Returns the rates by part."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["part"]: group["lr"] for group in optimizer.param_groups}
