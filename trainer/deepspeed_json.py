"""DeepSpeed's JSON, as it is handed to the engine.

The file in `ds_configs/` owns ZeRO and communication; batch, precision, clipping and rates are the YAML's, and "auto"
in the JSON means "from the YAML". A contradiction between the two is a mistake, and so is a key DeepSpeed does not
know, which it would accept in silence.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import did_you_mean

if TYPE_CHECKING:
    from trainer.config import Config

ALLOWED = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "zero_optimization", "communication_data_type", "data_types", "prescale_gradients", "gradient_predivide_factor",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print",
    "wall_clock_breakdown", "dump_state", "comms_logger", "flops_profiler", "memory_breakdown", "aio", "compile",
    "seq_parallel_communication_data_type", "disable_allgather", "timers",
}  # fmt: skip
"""Top-level keys that make sense here. (source: DeepSpeed 0.19.8's configuration)"""

REFUSED = {
    "optimizer": "the optimizer is AdamW, set under optim in the YAML",
    "scheduler": "the schedule is set under optim in the YAML",
    "fp16": "training is bf16 or fp32, set by train.bf16 in the YAML",
    "amp": "training is bf16 or fp32, set by train.bf16 in the YAML",
    "activation_checkpointing": "set model.activation_checkpointing in the YAML",
    "tensorboard": "the trainer writes its own curves",
}


def build(file: Path, config: "Config", world_size: int) -> tuple[dict[str, Any], list[str]]:
    """(what the engine gets, what is wrong in the file, one line each)."""
    try:
        given = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        return {}, [f"deepspeed: {file} is not readable JSON ({error})"]
    if not isinstance(given, dict):
        return {}, [f"deepspeed: {file}: expected an object, found a {type(given).__name__}"]
    errors = []
    for key in given:
        if key in REFUSED:
            errors.append(f"deepspeed: {file}: '{key}' does not belong here: {REFUSED[key]}")
        elif key not in ALLOWED:
            hint = did_you_mean(key, ALLOWED)
            errors.append(f"deepspeed: {file}: unknown key '{key}'" + (f"; {hint}" if hint else ""))

    errors += _unsupported(file, given)
    train = config.train
    micro = train.micro_batch_size
    accumulation = train.global_batch_size // max(1, micro * world_size)
    if train.micro_batch_tokens is not None:
        # The steps' micro-batches differ in number and size, and the loop says which is the last. DeepSpeed only has to
        # know that there are several, and wants a product that comes out.
        micro, accumulation = 1, max(2, -(-train.global_batch_size // world_size))
    owned: dict[str, Any] = {
        "train_batch_size": micro * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.max_grad_norm,
        "bf16": {"enabled": train.bf16},
    }
    for key, value in owned.items():
        errors += _contradictions(file, key, given.get(key, "auto"), value)
    if isinstance(given.get("bf16"), dict):
        owned["bf16"] = {**given["bf16"], **owned["bf16"]}
    merged: dict[str, Any] = {
        # Gradients of the micro-batches are summed in fp32: bf16 would lose the small ones.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **given,
        **owned,
    }
    return merged, errors


def _unsupported(file: Path, given: dict[str, Any]) -> list[str]:
    """What DeepSpeed would take, and the trainer cannot do its work with."""
    zero = given.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    errors = []
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (1, 2, 3):
        why = ": without ZeRO a step whose numbers are not finite would be applied, not skipped" if stage == 0 else ""
        errors.append(f"deepspeed: {file}: zero_optimization.stage is {stage!r}, expected 1, 2 or 3{why}")
    if isinstance(given.get("bf16"), dict) and given["bf16"].get("check_grad_overflow") is False:
        errors.append(
            f"deepspeed: {file}: bf16.check_grad_overflow is false: a step whose numbers are not finite would be "
            f"applied, not skipped; leave it out"
        )
    if zero.get("compute_grad_norm") is False:
        errors.append(
            f"deepspeed: {file}: zero_optimization.compute_grad_norm is false: in fp32 a step whose gradients are not "
            f"finite would be applied, not skipped; leave it out"
        )
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("device") == "nvme" and stage != 3:
        errors.append(
            f"deepspeed: {file}: zero_optimization.offload_optimizer.device is nvme, which only ZeRO-3 knows; with "
            f"stage {stage} choose cpu or none"
        )
    if isinstance(zero.get("offload_param"), dict) and zero["offload_param"].get("device") == "nvme":
        errors.append(
            f"deepspeed: {file}: zero_optimization.offload_param.device is nvme, where frozen weights cannot be "
            f"watched; expected cpu or none"
        )
    return errors


def _contradictions(file: Path, key: str, given: Any, value: Any) -> list[str]:
    if isinstance(value, dict) and isinstance(given, dict):
        return [e for k, v in value.items() for e in _contradictions(file, f"{key}.{k}", given.get(k, "auto"), v)]
    if given in ("auto", value):
        return []
    return [f'deepspeed: {file}: {key} is {given!r}, but the YAML makes it {value!r}; write "auto" there']
