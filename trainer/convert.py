"""A checkpoint taken up at another geometry: other ranks, or another ZeRO stage.

DeepSpeed cuts what it trains into flat pieces, one for each rank, and the cut depends on ranks and stage. Here the
pieces are read where they lie on disk, put together a parameter at a time, and given to an engine that cuts them
anew. Nothing is computed, so every bit stays; then every tensor is read back from the engine and compared.
"""

import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import SafetensorError, safe_open

from trainer.dist import raise_together
from trainer.errors import CheckpointError, refused_name
from trainer.lora import stored_name

FP32 = "fp32"
"""The master weights, beside AdamW's own names for what it gathers:"""
MOMENTS = ("exp_avg", "exp_avg_sq")

MASTERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""Flat master weights, as the optimizers name them of ZeRO-3, of ZeRO-1 and 2, and of ZeRO-1 in bf16."""

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""What the engine counts, as it names them itself and in its files."""


@dataclass(frozen=True)
class Piece:
    """Where some elements of a parameter are: so many from `start` on, in a flat group of a rank's file."""

    rank: int
    group: int
    start: int
    numel: int


@dataclass(frozen=True)
class Stored:
    """What DeepSpeed's files hold of every trained parameter."""

    shapes: dict[str, torch.Size]
    pieces: dict[str, list[Piece]]
    flat: list[list[dict[str, torch.Tensor]]]
    """By rank and group: the flat tensors by key, mapped from disk, so that they are in memory only while read."""
    step: float | None
    """Steps that AdamW has done, or None if it has done none and so gathered nothing."""
    counters: dict[str, int]

    @property
    def keys(self) -> tuple[str, ...]:
        return (FP32,) if self.step is None else (FP32, *MOMENTS)

    def whole(self, name: str, key: str) -> torch.Tensor:
        """One tensor of a parameter, put together."""
        parts = [self.flat[p.rank][p.group][key].narrow(0, p.start, p.numel) for p in self.pieces[name]]
        return torch.cat(parts).detach().view(self.shapes[name])


def convert(engine: deepspeed.DeepSpeedEngine, files: Path, world_size: int, zero_stage: int) -> None:
    """Master weights, moments and step of every trained parameter, from DeepSpeed's files, into a new engine.

    Frozen weights are to be in the engine already. All ranks call this, where `torch.serialization.safe_globals` are
    set to what the files may hold beside tensors and plain values.

    files: folder of DeepSpeed in a checkpoint; those of Transformers lie beside it.
    world_size, zero_stage: that the files are cut for.

    Raises CheckpointError, on all ranks, where a file is missing, damaged or holds anything else, where other
    parameters were trained, and where a tensor in the engine is not, bit for bit, the one in the checkpoint.
    """
    stored, exported, failure = None, None, None
    try:
        _check_target(engine)
        stored, exported = read(files, world_size, zero_stage), Exported(files.parent)
        _check_same_parameters(files, stored, engine)
    except CheckpointError as error:
        failure = error
    raise_together(failure)
    assert stored
    assert exported
    if stored.step is not None:
        _make_moments(engine, stored.step)
    for name in COUNTERS:
        setattr(engine, name, stored.counters[name])

    wrong = []
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            values = {key: stored.whole(name, key) for key in stored.keys}
            _put(parameter, values)
            wrong += [f"{key} of {name}" for key, value in values.items() if not _came_back(parameter, key, value)]
        weight = _weight(parameter)
        if parameter.requires_grad and not _agree(weight, values[FP32]):
            wrong.append(f"{name} as the model has it")
        if not _agree(weight, exported.get(name)):
            wrong.append(f"{name} as it was exported")
    if wrong:
        failure = CheckpointError(
            f"{files.parent}: converted from {world_size} ranks under ZeRO-{zero_stage}, the engine differs from it in "
            f"{len(wrong)} tensors, among them {', '.join(wrong[:3])}; go on as it was written, or take the weights "
            f"alone, with model.init_from={files.parent}"
        )
    raise_together(failure)


# --- The files of the geometry before ---


def read(files: Path, world_size: int, zero_stage: int) -> Stored:
    """DeepSpeed's files of a checkpoint, opened. Raises CheckpointError, naming the file, where one cannot be read."""
    if zero_stage not in (1, 2, 3):
        raise CheckpointError(f"{files}: written without ZeRO (stage {zero_stage}), it only goes on as it was written")
    model_file = _only(files, f"{'zero_pp_rank_0_' if zero_stage == 3 else ''}mp_rank_00_model_states.pt")
    # In bf16 the names have another word in front.
    rank_files = [_only(files, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in range(world_size)]
    model, ranks = _open(model_file), [_open(file) for file in rank_files]
    flat = [_groups(file, content, zero_stage) for file, content in zip(rank_files, ranks, strict=True)]
    steps = {float(group["step"]) if "step" in group else None for groups in flat for group in groups}
    if len(steps) != 1:
        raise CheckpointError(f"{files}: groups or ranks differ in their steps: {sorted(steps, key=str)}")
    try:
        shapes = model["param_shapes"]
        pieces = dict(_zero3(shapes, world_size) if zero_stage == 3 else _zero2(shapes, ranks))
        counters = {name: int(model[name]) for name in COUNTERS}
        all_shapes = {name: shape for group in shapes for name, shape in group.items()}
    except UNLIKE as error:
        raise _unknown(model_file, error) from error
    stored = Stored(all_shapes, pieces, flat, steps.pop(), counters)
    for name, key, part in ((n, k, p) for n, parts in pieces.items() for k in stored.keys for p in parts):
        group = flat[part.rank][part.group] if part.group < len(flat[part.rank]) else {}
        found = group[key].numel() if key in group else 0
        if found < part.start + part.numel:
            raise CheckpointError(
                f"{rank_files[part.rank]}: {key} of {name} is cut off: its group has {found} elements, expected at "
                f"least {part.start + part.numel}"
            )
    return stored


def _groups(file: Path, content: dict[str, Any], zero_stage: int) -> list[dict[str, torch.Tensor]]:
    """The flat tensors of a rank, by group and key."""
    try:
        zero = content["optimizer_state_dict"]
        found = int(zero.get("zero_stage", 1))  # the optimizer of ZeRO-1 in bf16 does not say it
        if found != zero_stage:
            raise ValueError(f"of ZeRO-{found}, expected ZeRO-{zero_stage}")
        state = zero["optimizer_state_dict" if zero_stage == 3 else "base_optimizer_state"]["state"]
        masters = zero["fp32_flat_groups" if zero_stage == 3 else "single_partition_of_fp32_groups"]
        return [{FP32: master, **state.get(group, {})} for group, master in enumerate(masters)]
    except UNLIKE as error:
        raise _unknown(file, error) from error


UNLIKE = (KeyError, TypeError, ValueError, AttributeError, IndexError)
"""What it comes to where a file is not laid out as expected."""


def _unknown(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file}: not laid out as DeepSpeed {deepspeed.__version__} does ({error!r}); go on with the version, "
        f"ranks and ZeRO stage that wrote it, or take the weights alone, with model.init_from={file.parents[1]}"
    )


def _only(files: Path, pattern: str) -> Path:
    found = sorted(files.glob(pattern))
    if len(found) != 1:
        raise CheckpointError(
            f"{files / pattern}: expected one such file, found {len(found)}; every rank's file of the geometry that "
            f"wrote the checkpoint is needed to go on at another"
        )
    return found[0]


def _open(file: Path) -> dict[str, Any]:
    """What `torch.save` wrote, with tensors left on disk until they are read. Loads no code."""
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        held = f"it holds {refused_name(error) or 'what is no pickle'}, expected tensors and plain values"
        raise CheckpointError(
            f"{file}: nothing was loaded: {held}; take the weights alone, with model.init_from={file.parents[1]}"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file}: nothing was loaded: not a whole file of torch.save's") from error


def _zero2(shapes: list[dict[str, torch.Size]], ranks: list[dict]) -> Iterator[tuple[str, list[Piece]]]:
    """ZeRO-1 and 2 lay the parameters of a group end to end and cut that into equal parts, one for each rank."""
    zero = [content["optimizer_state_dict"] for content in ranks]
    for group, members in enumerate(shapes):
        # A part without the filling at the end of the group, which is not saved, and that filling. The optimizer of
        # ZeRO-1 in bf16 saves parts as they are.
        sizes = {
            len(z["single_partition_of_fp32_groups"][group]) + z["group_paddings"][group] * ("zero_stage" in z)
            for z in zero
        }
        if len(sizes) != 1:
            raise ValueError(f"the parts of group {group} differ in size: {sorted(sizes)}")
        (size,), offset = sizes, 0
        fillings = zero[0].get("param_alignment_paddings", [[0] * len(members)] * len(shapes))[group]
        for (name, shape), filling in zip(members.items(), fillings, strict=True):
            end, pieces = offset + shape.numel(), []
            while offset < end:
                rank, start = divmod(offset, size)
                numel = min(end - offset, size - start)
                pieces.append(Piece(rank, group, start, numel))
                offset += numel
            yield name, pieces
            offset += filling


def _zero3(shapes: list[dict[str, torch.Size]], world_size: int) -> Iterator[tuple[str, list[Piece]]]:
    """ZeRO-3 cuts every parameter into equal parts, the last one filled up, and a rank lays its parts end to end."""
    for group, members in enumerate(shapes):
        offset = 0
        for name, shape in members.items():
            numel, size = shape.numel(), math.ceil(shape.numel() / world_size)
            parts = [(rank, min(size, numel - rank * size)) for rank in range(world_size)]
            yield name, [Piece(rank, group, offset, count) for rank, count in parts if count > 0]
            offset += size


# --- The engine of the geometry now ---


def _check_target(engine: deepspeed.DeepSpeedEngine) -> None:
    zero, stage = engine.optimizer, int(engine.zero_optimization_stage())
    what = (
        "train without ZeRO (stage 0)" if stage == 0
        else "offload to NVMe" if getattr(zero, "swap_optimizer", False)
        else "offload a part of the optimizer (ratio)" if getattr(zero, "partial_offload", 1.0) != 1.0
        else "deal parameters out in turn (round_robin_gradients)" if getattr(zero, "round_robin_gradients", False)
        else None
    )  # fmt: skip
    if what:
        raise CheckpointError(f"deepspeed: a checkpoint of another geometry cannot go on where the settings {what}")


def _check_same_parameters(files: Path, stored: Stored, engine: deepspeed.DeepSpeedEngine) -> None:
    now = {n: getattr(p, "ds_shape", p.shape) for n, p in engine.module.named_parameters() if p.requires_grad}
    wrong = [f"{name} was trained, and is not now" for name in stored.shapes.keys() - now.keys()]
    wrong += [f"{name} is trained, and was not then" for name in now.keys() - stored.shapes.keys()]
    wrong += [
        f"{name} was of shape {tuple(stored.shapes[name])}, is {tuple(now[name])}"
        for name in now.keys() & stored.shapes.keys() if stored.shapes[name] != now[name]
    ]  # fmt: skip
    if wrong:
        raise CheckpointError(
            f"{files.parent}: {len(wrong)} parameters differ: {'; '.join(sorted(wrong)[:3])}. Set `freeze` and `lora` "
            f"back, or start a new stage, with model.init_from={files.parent}"
        )


def _make_moments(engine: deepspeed.DeepSpeedEngine, step: float) -> None:
    """AdamW's state as it is after a step, to be filled: a new optimizer has none."""
    zero = engine.optimizer
    stage3 = engine.zero_optimization_stage() == 3
    for flat in next(getattr(zero, name) for name in MASTERS if hasattr(zero, name)):
        moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
        zero.optimizer.state[flat] = {"step": torch.tensor(step, dtype=torch.float32, device=flat.device), **moments}
    if not stage3:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()  # as after the first step: only then are moments found by parameter


def _put(parameter: Any, values: dict[str, torch.Tensor]) -> None:
    """A parameter's tensors, whole, into the part that this rank has, and the weight the model computes with."""
    stage3 = hasattr(parameter, "ds_id")
    for key, value in values.items():
        if stage3:
            # DeepSpeed's setter of whole tensors fails under ZeRO-3 where a size is no multiple of the ranks.
            part, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
            mine = torch.zeros(part)
            here = value.flatten()[rank * part : (rank + 1) * part]
            mine[: len(here)] = here
            if key == FP32:
                safe_set_local_fp32_param(parameter, mine)
            else:
                safe_set_local_optimizer_state(parameter, mine, key)
        elif key == FP32:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=stage3):
        if not stage3 or torch.distributed.get_rank() == 0:
            parameter.data.copy_(values[FP32])


def _came_back(parameter: torch.nn.Parameter, key: str, value: torch.Tensor) -> bool:
    """Whether the engine, asked for a tensor, has it; the answer is rank 0's. All ranks call this."""
    found = safe_get_full_fp32_param(parameter) if key == FP32 else safe_get_full_optimizer_state(parameter, key)
    return torch.distributed.get_rank() != 0 or (found is not None and _agree(found.detach().cpu(), value))


def _weight(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """What the model computes with, whole, on the CPU of rank 0. All ranks call this."""
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().to("cpu", copy=True) if torch.distributed.get_rank() == 0 else None


def _agree(here: torch.Tensor | None, there: torch.Tensor | None) -> bool:
    """Whether two tensors are equal, at the precision of the coarser; True where this rank is not the one to say."""
    if here is None:
        return True
    if there is None or here.shape != there.shape:
        return False
    dtype = min(here.dtype, there.dtype, key=lambda dtype: dtype.itemsize)
    # DeepSpeed gathers by adding zeros, which turns -0 into 0; and what is not a number equals nothing, itself neither.
    return torch.allclose(here.to(dtype), there.to(dtype), rtol=0, atol=0, equal_nan=True)


class Exported:
    """The weights in a checkpoint's export, with LoRA also those of its base, read one at a time, on rank 0."""

    def __init__(self, checkpoint: Path):
        files = sorted(checkpoint.glob("*/*.safetensors")) if torch.distributed.get_rank() == 0 else []
        self.where: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as content:
                    self.where |= dict.fromkeys(content.keys(), file)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: cannot be read ({error})") from error

    def get(self, name: str) -> torch.Tensor | None:
        """name: of the parameter in the engine."""
        name = stored_name(name)
        if name not in self.where:
            return None
        with safe_open(self.where[name], "pt") as content:
            return content.get_tensor(name)
