"""What is wrong with a configuration, all at once, without reading weights or data."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import deepspeed_json
from trainer.errors import ConfigError
from trainer.paths import expand_braces, expand_shards, find_deepspeed
from trainer.urls import check_scheme, scheme_of

if TYPE_CHECKING:
    from trainer.config import Config, ModelConfig, TrainConfig


def mistakes(config: "Config", world_size: int, needs_data: bool) -> list[str]:
    """One line each. needs_data: false where shards may be missing."""
    return [
        *_check_model(config.model), *_check_freeze(config), *_check_lora(config), *_check_data(config, needs_data),
        *_check_mixture(config), *_check_evaluation(config), *_check_numbers(config),
        *_check_batch(config.train, world_size), *_check_files(config, world_size),
    ]  # fmt: skip


def _check_model(model: "ModelConfig") -> list[str]:
    errors = []
    parts = {"language_model": model.language_model, "vision_tower": model.vision_tower}
    if model.init_from:
        if any(parts.values()):
            errors.append("model: give either init_from or language_model and vision_tower, not both")
    else:
        errors += [f"model.{name}: missing; or give model.init_from" for name, folder in parts.items() if not folder]
    every = model.activation_checkpointing
    if every != "auto" and not isinstance(every, bool) and every < 1:
        errors.append(
            f"model.activation_checkpointing: {every}: expected true, false, auto, or a number k above 0, "
            f"for every k-th layer"
        )
    folders = {**parts, "init_from": model.init_from, "tokenizer": model.tokenizer}
    for name, folder in folders.items():
        if folder and not Path(folder).is_dir():
            start = "" if Path(folder).is_absolute() else f" in {Path.cwd()}"
            errors.append(f"model.{name}: no such folder: {folder}{start}")
        elif folder and name in MODEL_TYPES:
            errors += _check_model_type(f"model.{name}", Path(folder), MODEL_TYPES[name])
    return errors


MODEL_TYPES = {
    "language_model": ("qwen", "qwen2", "qwen3"),
    "vision_tower": ("clip", "clip_vision_model", "siglip", "siglip_vision_model"),
}
"""`model_type` of the folders' config.json that each key takes; a language model may be any causal one."""


def _check_model_type(where: str, folder: Path, expected: tuple[str, ...]) -> list[str]:
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found, quantized = settings.get("model_type"), settings.get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        return [f"{where}: {folder} has no readable config.json ({error})"]
    if quantized:
        method = quantized.get("quant_method", "quantized") if isinstance(quantized, dict) else quantized
        return [f"{where}: {folder} is quantized ({method}) and cannot train: name the model that it was made from"]
    if found in expected or ("language_model" in where and _is_causal(found)):
        return []
    other = ", or another causal language model of Transformers" if "language_model" in where else ""
    return [f"{where}: {folder} is of architecture '{found}', expected {' or '.join(map(repr, expected))}{other}"]


def _is_causal(model_type: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # slow to import

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _check_freeze(config: "Config") -> list[str]:
    """Whether all are expressions; what they match only the model can tell."""
    errors = []
    for pattern in config.freeze:
        try:
            re.compile(pattern)
        except re.error as error:
            errors.append(f"freeze: '{pattern}' is not a regular expression ({error})")
    return errors


def _check_lora(config: "Config") -> list[str]:
    if config.lora is None:
        return []
    lora, errors = config.lora, []
    errors += [
        f"lora.{name}: must be at least 1, found {n}" for name, n in (("r", lora.r), ("alpha", lora.alpha)) if n < 1
    ]
    if not 0 <= lora.dropout < 1:
        errors.append(f"lora.dropout: must be from 0 to below 1, found {lora.dropout}")
    if not all(name.strip() for name in lora.target_modules.split("|")):
        errors.append(f"lora.target_modules: expected names with | between them, found '{lora.target_modules}'")
    if of_layers := [pattern for pattern in config.freeze if pattern.startswith("language_model.")]:
        errors.append(f"freeze: {frozen_by_lora(of_layers[0])}")
    return errors


def frozen_by_lora(pattern: str) -> str:
    """What is said of a pattern of `freeze` that names some of the language model's weights beside LoRA."""
    return (
        f"with lora all of the language model's own weights are frozen, and adapters train in every layer: "
        f"leave '{pattern}' out"
    )


def _check_data(config: "Config", needs_data: bool) -> list[str]:
    errors = [] if config.data.train else ["data.train: no source to train on"]
    for split in ("train", "eval"):
        for number, source in enumerate(getattr(config.data, split)):
            where = f"data.{split}[{number}].shards"
            if not source.shards:
                errors.append(f"{where}: names no tar")
                continue
            for pattern in [source.shards] if isinstance(source.shards, str) else source.shards:
                if scheme_of(pattern):
                    errors += _check_url(where, pattern)
                if scheme_of(pattern) or not needs_data:
                    continue
                tars = expand_shards(pattern)
                missing = [str(tar) for tar in tars if not Path(tar).is_file()]
                if Path(pattern).is_dir():
                    errors.append(f"{where}: '{pattern}' is a folder; write '{pattern.rstrip('/')}/*.tar'")
                elif not tars:
                    errors.append(f"{where}: '{pattern}' matches no file")
                elif missing:
                    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
                    errors.append(f"{where}: no such file: {missing[0]}{more}")
    return errors


def _check_url(where: str, pattern: str) -> list[str]:
    """What is wrong with a URL, without asking its server."""
    try:
        for one in expand_braces(pattern):
            check_scheme(one)
    except ConfigError as error:
        return [f"{where}: {error}"]
    return []


def _check_mixture(config: "Config") -> list[str]:
    """Whether weights, packing and the token budget fit together."""
    data, train, errors = config.data, config.train, []
    weights = [source.weight for source in data.train]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        errors.append("data.train: give every source a weight, or none")
    for number, weight in enumerate(weights):
        if weight is not None and weight <= 0:
            errors.append(f"data.train[{number}].weight: must be above 0, found {weight}; leave the source out instead")
    if any(weights) and train.epochs is not None:
        errors.append("train.epochs: weighted sources have epochs of their own; give train.max_steps instead")
    names = [source.name for source in data.train]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        errors.append(f"data.train: several sources are named {', '.join(twice)}; each needs a name of its own")
    for number, source in enumerate(data.eval):
        if source.weight is not None:
            errors.append(f"data.eval[{number}].weight: held-out sources have no weights; all their samples count")
    if data.cache_gib <= 0:
        errors.append(f"data.cache_gib: must be above 0, found {data.cache_gib}")
    if not 0 <= data.max_bad_fraction <= 1:
        errors.append(f"data.max_bad_fraction: must be between 0 and 1, found {data.max_bad_fraction}")
    if train.micro_batch_tokens is not None and data.packing:
        errors.append("train.micro_batch_tokens: packs are of like length already; set train.micro_batch_size instead")
    elif train.micro_batch_tokens is not None and train.micro_batch_tokens < data.max_length:
        errors.append(
            f"train.micro_batch_tokens={train.micro_batch_tokens} is less than data.max_length={data.max_length}: the "
            f"longest sample would not fit"
        )
    return errors


def _check_evaluation(config: "Config") -> list[str]:
    """Whether what hangs on held-out samples has any."""
    errors = []
    if config.checkpoint.keep_best and not (config.data.eval and config.eval.every_steps):
        errors.append("checkpoint.keep_best: needs held-out losses: give data.eval and eval.every_steps")
    if config.eval.answers > 0 and not config.data.eval:
        errors.append("eval.answers: needs held-out samples: give data.eval")
    return errors


def _check_numbers(config: "Config") -> list[str]:
    errors = []
    train, optim = config.train, config.optim
    if (train.epochs is None) == (train.max_steps is None):
        errors.append("train.max_steps: give either this or train.epochs, and null for the other")
    positive = {
        "train.epochs": train.epochs, "train.max_steps": train.max_steps, "data.max_length": config.data.max_length,
        "train.global_batch_size": train.global_batch_size, "train.micro_batch_size": train.micro_batch_size,
        "run.hang_seconds": config.run.hang_seconds,
        "train.max_skipped_steps": train.max_skipped_steps, "checkpoint.save_steps": config.checkpoint.save_steps,
        "logging.every_steps": config.logging.every_steps, "eval.max_new_tokens": config.eval.max_new_tokens,
    }  # fmt: skip
    errors += [f"{name}: must be at least 1, found {n}" for name, n in positive.items() if n is not None and n < 1]
    not_negative = {
        "data.num_workers": config.data.num_workers, "checkpoint.keep_last": config.checkpoint.keep_last,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "eval.every_steps": config.eval.every_steps, "eval.samples": config.eval.samples,
        "eval.answers": config.eval.answers,
        "optim.learning_rate": optim.learning_rate, "optim.weight_decay": optim.weight_decay,
        "optim.max_grad_norm": optim.max_grad_norm, "optim.projector_learning_rate": optim.projector_learning_rate,
    }  # fmt: skip
    errors += [
        f"{name}: must not be negative, found {n}" for name, n in not_negative.items() if n is not None and n < 0
    ]
    if abs(config.run.seed) >= 2**63:
        errors.append(f"run.seed: must be a number of 63 bits, found {config.run.seed}")
    if train.max_loss_ratio is not None and train.max_loss_ratio <= 1:
        errors.append(f"train.max_loss_ratio: must be above 1, found {train.max_loss_ratio}; null for none")
    if not 0 <= optim.warmup_ratio <= 1:
        errors.append(f"optim.warmup_ratio: must be between 0 and 1, found {optim.warmup_ratio}")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        errors.append(f"optim.betas: expected two numbers from 0 to below 1, found {optim.betas}")
    return errors


def _check_files(config: "Config", world_size: int) -> list[str]:
    errors = []
    file = find_deepspeed(config.deepspeed)
    if file.is_file():
        errors += deepspeed_json.build(file, config, world_size)[1]
    else:
        errors.append(f"deepspeed: no such file: {config.deepspeed}")
    if Path(config.run.output_dir).exists() and not Path(config.run.output_dir).is_dir():
        errors.append(f"run.output_dir: {config.run.output_dir} is a file, expected a folder")
    return errors


def _check_batch(train: "TrainConfig", world_size: int) -> list[str]:
    """Whether the global batch can be cut into whole micro-batches on so many ranks."""
    unit = train.micro_batch_size * world_size
    if train.micro_batch_tokens is not None or unit < 1 or train.global_batch_size % unit == 0:
        return []
    lower = train.global_batch_size // unit * unit
    nearest = ", ".join(str(n) for n in (lower, lower + unit) if n)
    return [
        f"train.global_batch_size={train.global_batch_size} is not a multiple of micro_batch_size x world size "
        f"({train.micro_batch_size} x {world_size}); nearest valid values: {nearest}"
    ]
