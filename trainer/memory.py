"""Bytes that a run takes on each rank and on disk, from shapes and settings alone.

What DeepSpeed holds for the model is written down here as its optimizers hold it (source: DeepSpeed 0.19.8,
`runtime/zero/stage_1_and_2.py`, `stage3.py`, `bf16_optimizer.py`; ZeRO: Rajbhandari et al. 2020), and compared with a
real engine in the tests. With n trained parameters on N ranks in bf16 and gradients summed in fp32: ZeRO-2 holds 2·n of
weights and (4 + 12)·n/N of sums and AdamW, ZeRO-3 (2 + 4 + 12)·n/N and what it has gathered for now; frozen parameters
take their weights only.
"""

import bisect
import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from deepspeed.runtime.config import DtypeEnum
from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from trainer import deepspeed_json
from trainer.activations import FP32, Activations, activation_bytes
from trainer.config import CheckpointConfig, Config, OptimConfig
from trainer.errors import ConfigError
from trainer.flops import BatchShape
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.optim import parameter_groups
from trainer.paths import find_deepspeed

ADAMW = 2 * FP32
"""Bytes a parameter of AdamW's two moments."""

MASTER = FP32
"""Bytes a parameter of the weights that AdamW updates, where they are not the model's own."""

CONTEXT_BYTES = 3 * 2**29
"""Of a GPU, for what lives outside PyTorch's allocator: CUDA's context, cuBLAS's work spaces, NCCL's channels. An
allowance, not a measurement."""

FRAGMENTATION = 0.05
"""Share of a GPU that is left free, for blocks that the allocator cannot use. An allowance, not a measurement."""


@dataclass(frozen=True)
class States:
    """Bytes of one rank: the fullest, where ranks differ. All but `host` are on its accelerator."""

    weights: float
    gradients: float
    """Summed over micro-batches, at the most between a backward pass and the optimizer's step."""
    optimizer: float
    buffers: float
    """Of communication, gathered weights, and the largest gradient on its way into them."""
    step: float
    """Copies for a while at the end of the backward pass and in the optimizer's step, when activations are gone."""
    host: float = 0.0
    """What is offloaded into the host's memory."""

    def total(self, activations: Activations) -> float:
        """The most that the rank's accelerator holds, allowances left out: an upper bound, for without accumulation
        gradients come only as activations go."""
        held = self.weights + self.gradients + self.optimizer + self.buffers
        return held + max(activations.peak, activations.inputs + self.step)


@dataclass(frozen=True)
class Sharding:
    """How DeepSpeed spreads a model over ranks: what its JSON says, and the parameters' sizes."""

    zero: DeepSpeedZeroConfig
    world_size: int
    size: int
    """Bytes of a weight."""
    sum_size: int
    """Bytes of a gradient that is summed over micro-batches."""
    reduced_size: int
    """Bytes of a gradient in communication."""
    accumulates: bool
    """A step has several micro-batches."""
    groups: list[list[int]]
    """Parameters of the tensors of each of the optimizer's groups."""
    tensors: list[int]
    """Parameters of all tensors, frozen ones too."""

    @classmethod
    def of(cls, model: nn.Module, optim: OptimConfig, settings: dict[str, Any], world_size: int) -> "Sharding":
        """settings: what the engine gets. model: with what is frozen marked; it may be on the meta device.

        Raises ConfigError for a mixture of types that DeepSpeed refuses when the engine is built.
        """
        zero = DeepSpeedZeroConfig(**settings.get("zero_optimization", {}))
        size = next(model.parameters()).element_size()
        summed = settings.get("data_types", {}).get("grad_accum_dtype")
        sum_size = _bytes_of("data_types.grad_accum_dtype", summed, size)
        if zero.stage == 0 and sum_size != size:
            raise ConfigError(
                f"deepspeed: zero_optimization.stage=0 sums gradients in the model's type, but train.bf16 with "
                f"data_types.grad_accum_dtype={summed!r} asks for another: use ZeRO-1 or above, or set it to 'bf16'"
            )
        return cls(
            zero, world_size, size, sum_size,
            _bytes_of("communication_data_type", settings.get("communication_data_type"), size),
            settings.get("gradient_accumulation_steps", 1) > 1,
            [[p.numel() for p in group["params"]] for group in parameter_groups(model, optim)],
            [p.numel() for p in model.parameters()],
        )  # fmt: skip

    @property
    def offloads_optimizer(self) -> bool:
        return bool(self.zero.offload_optimizer and self.zero.offload_optimizer.device != "none")

    @property
    def offloads_weights(self) -> bool:
        return bool(self.zero.offload_param and self.zero.offload_param.device != "none")

    @property
    def offloads(self) -> bool:
        """Anything is in the host's memory."""
        return self.offloads_optimizer or self.offloads_weights

    @cached_property
    def trained(self) -> int:
        return sum(map(sum, self.groups))

    @cached_property
    def parts(self) -> list[int]:
        """ZeRO-1 and 2: parameters of each group on a rank; the flat group is filled up to a multiple of 2·N."""
        return [2 * math.ceil(sum(group) / (2 * self.world_size)) for group in self.groups]

    def shards(self, tensors: list[int]) -> int:
        """ZeRO-3: parameters of a rank, each tensor's cut into N."""
        return sum(math.ceil(tensor / self.world_size) for tensor in tensors)

    def whole_gradients(self) -> int:
        """Parameters of the tensors that reach into a rank's part of the flat groups: summed in the model's own type,
        their gradients are kept whole."""
        return max(
            sum(_reaching(group, part, rank) for group, part in zip(self.groups, self.parts, strict=True))
            for rank in range(self.world_size)
        )

    def states(self) -> States:
        """What a rank holds."""
        return (self._stage_0, self._stage_1, self._stage_2, self._stage_3)[self.zero.stage]()

    @property
    def bucket_size(self) -> int:
        """Gradients that are reduced together: not more than there are."""
        return min(self.zero.reduce_bucket_size, self.trained)

    @property
    def _bucket(self) -> int:
        """Bytes of such a bucket, and of the largest gradient on its way there."""
        return self.reduced_size * self.bucket_size + self.size * max(map(max, self.groups))

    def _stage_0(self) -> States:
        other_type = self.size != FP32
        return States(
            weights=self.size * sum(self.tensors), gradients=self.size * self.trained,
            optimizer=(ADAMW + MASTER * other_type) * self.trained,
            buffers=self.size * min(self.trained, MEMORY_OPT_ALLREDUCE_SIZE) * (self.world_size > 1),
            step=FP32 * self.trained * other_type,
        )  # fmt: skip

    def _stage_1(self) -> States:
        states, gradients = self._stage_2(), self.sum_size * self.trained
        if self.offloads:
            # The sums are on the accelerator, and are reduced in their own type.
            bucket = (self.sum_size - self.size) * self.bucket_size
            host = (MASTER + ADAMW + FP32 + self.size) * sum(self.parts)
            return replace(states, gradients=gradients, buffers=states.buffers + bucket, host=host)
        if self.sum_size == self.size:
            return replace(states, gradients=gradients)
        # In bf16 with fp32 sums another optimizer is at work: no bucket, and a micro-batch's own gradients stay too. To
        # be reduced, the sums of all groups are laid end to end, up to a size that is left out here, and cast.
        copies = self.sum_size * (len(self.groups) > 1) + self.reduced_size * (self.reduced_size != self.sum_size)
        return replace(states, gradients=gradients + self.size * self.trained, buffers=0, step=copies * self.trained)

    def _stage_2(self) -> States:
        part, same_type = sum(self.parts), self.sum_size == self.size
        gradients = self.size * self.whole_gradients() if same_type else self.sum_size * part
        optimizer, host = (MASTER + ADAMW) * part, 0
        if self.offloads:
            # With the moments go their gradients in fp32, and the weights on their way back; and the sums, where they
            # are of the model's type.
            host = (MASTER + ADAMW + FP32 + self.size) * part
            host += gradients * (same_type and self.accumulates)
            gradients, optimizer = gradients * (not same_type), 0
        return States(
            weights=self.size * sum(self.tensors), gradients=gradients, optimizer=optimizer,
            buffers=self._bucket + self.reduced_size * self.bucket_size * bool(self.zero.overlap_comm),
            # Whole gradients: those of the last micro-batch beside the sums, then a flat copy of each group's.
            step=max(gradients * self.accumulates, FP32 * max(self.parts)) * (same_type and not self.offloads),
            host=host,
        )  # fmt: skip

    def _stage_3(self) -> States:
        part = self.shards([tensor for group in self.groups for tensor in group])
        weights, gradients, optimizer = (
            self.size * self.shards(self.tensors), self.sum_size * part, (MASTER + ADAMW) * part
        )  # fmt: skip
        step, host = FP32 * min(self.zero.sub_group_size, max(map(self.shards, self.groups))), 0
        # Weights stay gathered up to a limit, and the next are fetched ahead.
        gathered = max(self.zero.max_live_parameters, *self.tensors) + self.zero.prefetch_bucket_size
        if self.offloads_optimizer:
            host = optimizer + FP32 * part + gradients
            gradients = optimizer = step = 0
        if self.offloads_weights:
            weights, host = 0, host + weights
        buffers = self._bucket + self.size * min(sum(self.tensors), gathered)
        return States(weights, gradients, optimizer, buffers, step, host)


def _reaching(group: list[int], part: int, rank: int) -> int:
    """Parameters of the tensors of a flat group that reach into a rank's part, and of what fills up the last one."""
    start, found = 0, 0
    for tensor in group:
        if start < (rank + 1) * part and start + tensor > rank * part:
            found += tensor
        start += tensor
    return found + max(0, min(part, (rank + 1) * part - start))


def _bytes_of(key: str, name: str | None, default: int) -> int:
    """Bytes of a value of a type as DeepSpeed's JSON names it."""
    try:
        return default if name is None else DtypeEnum(name).value.itemsize
    except ValueError as error:
        raise ConfigError(f"deepspeed: {key} is {name!r}, expected fp32, bf16 or fp16") from error


@dataclass(frozen=True)
class CheckpointBytes:
    """Bytes of weights and states in a checkpoint; its text files, a few MB with a large tokenizer, are left out."""

    frozen: float
    """Exported weights that do not train: the same in all checkpoints of a run."""
    trained: float
    """Exported weights that do."""
    ranks: list[float]
    """Of each rank's files in deepspeed/, which leave frozen weights out."""

    @property
    def each(self) -> float:
        """What every checkpoint adds."""
        return self.trained + sum(self.ranks)


def checkpoint_bytes(sharding: Sharding) -> CheckpointBytes:
    """Of one checkpoint of a run under this sharding."""
    trained, stage = sharding.trained, sharding.zero.stage
    if stage == 3:
        tensors = [tensor for group in sharding.groups for tensor in group]
        ranks = [float((MASTER + ADAMW) * sharding.shards(tensors))] * sharding.world_size
    else:
        states = sharding.states().optimizer if stage == 0 else (MASTER + ADAMW) * sum(sharding.parts)
        ranks = [float(states)] + [0.0 if stage == 0 else float(states)] * (sharding.world_size - 1)
        ranks[0] += sharding.size * trained  # the weights that train, once
    frozen = sum(sharding.tensors) - trained
    return CheckpointBytes(sharding.size * frozen, sharding.size * trained, ranks)


def most_checkpoints(config: CheckpointConfig, last_step: int | None) -> int:
    """Checkpoints that are on disk at once, at most: those kept, and a new one before the oldest goes.

    last_step: None where it is not known, which does only with `keep_last` and without `keep_every`.
    """
    kept = config.keep_last + 1 + config.keep_best
    if last_step is None:
        return kept
    saved = {*range(config.save_steps, last_step, config.save_steps), last_step}
    for_good = {step for step in saved if config.keep_every and step % config.keep_every == 0}
    return min(len(saved), kept + len(for_good)) if config.keep_last else len(saved)


def usable(gpu_memory: float) -> float:
    """Bytes of a GPU that tensors may take: what the allowances leave."""
    return gpu_memory * (1 - FRAGMENTATION) - CONTEXT_BYTES


@dataclass(frozen=True)
class Option:
    """One way to spread a model over the ranks."""

    name: str
    file: str | None
    """DeepSpeed's JSON, where there is one of it: the configuration's own, or of the repository."""
    sharding: Sharding | None
    """None where DeepSpeed refuses it."""
    own: bool = False
    """The configuration's."""


REPOSITORY = {"ZeRO-1": "ds_configs/zero1.json", "ZeRO-2": "ds_configs/zero2.json",
              "ZeRO-3": "ds_configs/zero3.json", "ZeRO-3, offload": "ds_configs/zero3_offload.json"}  # fmt: skip


def options(model: nn.Module, config: Config, settings: dict[str, Any], world_size: int) -> list[Option]:
    """ZeRO-0 to 3, with and without offload. settings: of the configuration's own JSON, which takes its place.

    Raises ConfigError where the configuration's own is refused.
    """
    own = Sharding.of(model, config.optim, settings, world_size)
    files = {name: deepspeed_json.build(find_deepspeed(file), config, world_size)[0]
             for name, file in REPOSITORY.items()}  # fmt: skip
    two = files["ZeRO-2"]
    offload = {"offload_optimizer": files["ZeRO-3, offload"]["zero_optimization"]["offload_optimizer"]}
    found = []
    for stage, offloads in itertools.product(range(4), (False, True)):
        name = f"ZeRO-{stage}" + ", offload" * offloads
        if stage == 0 and offloads:
            continue
        if (own.zero.stage, own.offloads) == (stage, offloads):
            found.append(Option(name, config.deepspeed, own, own=True))
            continue
        section = {**two["zero_optimization"], "stage": stage, **(offload if offloads else {})}
        settings = files.get(name, {**two, "zero_optimization": section})
        try:
            sharding = Sharding.of(model, config.optim, settings, world_size)
        except ConfigError:
            sharding = None
        found.append(Option(name, REPOSITORY.get(name), sharding))
    return found


def largest_batch(
    model: MQWenForConditionalGeneration, states: States, row: BatchShape, every: int, room: float, most: int
) -> int:
    """Rows that fit into so many bytes of a rank's accelerator, up to `most`; 0 where not even one does. every: the
    layers whose activations are recomputed, as in `is_recomputed`."""

    def too_large(rows: int) -> bool:
        return states.total(activation_bytes(model, row * rows, every)) > room

    return bisect.bisect_left(range(1, most + 1), True, key=too_large)


UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
"""In bytes. `--gpu-memory` takes each; figures are shown in the last two."""


def unit_of(count: float) -> str:
    """The unit in which so many bytes are shown."""
    return "GiB" if count >= UNITS["GiB"] else "MiB"


def format_bytes(count: float) -> str:
    """24.03 GiB: bytes in their unit."""
    unit = unit_of(count)
    return f"{count / UNITS[unit]:,.2f} {unit}"


def parse_bytes(key: str, text: str) -> float:
    """ "80GiB" -> bytes. Raises ConfigError, naming `key`, for what is not a number above 0 with one of `UNITS`."""
    unit = text.lstrip("0123456789. ")
    if unit not in UNITS:
        raise ConfigError(f"{key} {text}: unknown unit '{unit}'; expected a number with {', '.join(UNITS)}, as 80GiB")
    try:
        value = float(text.removesuffix(unit)) * UNITS[unit]
    except ValueError as error:
        raise ConfigError(f"{key} {text}: '{text.removesuffix(unit)}' is no number; write it as 80GiB") from error
    if value <= 0:
        raise ConfigError(f"{key} {text}: must be above 0")
    return value
