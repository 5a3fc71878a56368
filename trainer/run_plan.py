"""The plan of a run as a person reads it.

configuration -> model on the meta device, rows, ways to shard -> text
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.activations import activation_bytes
from trainer.config import Config
from trainer.data.template import ChatTemplate
from trainer.dist import World
from trainer.engine import deepspeed_settings
from trainer.flops import step_flops
from trainer.freeze import freeze, table
from trainer.load import meta_model
from trainer.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    UNITS,
    Option,
    checkpoint_bytes,
    format_bytes,
    largest_batch,
    most_checkpoints,
    options,
    unit_of,
    usable,
)
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.recomputation import in_words, recompute_every
from trainer.rows import Rows, full_rows, missing_shards, open_rows
from trainer.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from trainer.measure import Measured  # imports training, slowly

ENOUGH_TOKENS = 4096
"""Tokens of a micro-batch from which more of them hardly make a GPU faster: a rule of thumb, not a measurement."""

MANY = 4
"""Micro-batches of a step from which ZeRO-1, that reduces gradients once a step, sends less over the network."""


@dataclass(frozen=True)
class Plan:
    """All that a report is made of."""

    config: Config
    world_size: int
    model: MQWenForConditionalGeneration
    """On the meta device, what is frozen marked."""
    rows: Rows
    options: list[Option]

    @property
    def own(self) -> Option:
        """The configuration's way to shard."""
        return next(option for option in self.options if option.own)

    @property
    def rank_rows(self) -> int:
        """Rows of a rank in a step, and so the largest micro-batch."""
        return max(1, self.config.train.global_batch_size // self.world_size)

    @property
    def micro_rows(self) -> float:
        """Rows of a micro-batch as it is set."""
        return self.rows.micro_rows(self.config)

    def recompute_every(self, room: float) -> int:
        """Layers whose activations training recomputes on a GPU with so many bytes for tensors: as set, or chosen."""
        setting = self.config.model.activation_checkpointing
        assert self.own.sharding is not None
        states, batch = self.own.sharding.states(), self.rows.largest_batch(self.config)
        return recompute_every(self.model, states, batch, room, setting)

    def fitting(self, option: Option, every: int, room: float) -> int:
        """Rows of the largest micro-batch in so many bytes."""
        if option.sharding is None:
            return 0
        states, widest = option.sharding.states(), self.rows.widest
        return largest_batch(self.model, states, widest, every, room, self.rank_rows)


def make_plan(config: Config, world_size: int) -> Plan:
    """What a configuration will take on so many ranks. Raises ConfigError and DataError as training would."""
    settings = deepspeed_settings(config, World(world_size=world_size))
    tokenizer = None if missing_shards(config.data.train) else load_tokenizer(config.model)
    model = meta_model(config, tokenizer)
    freeze(model, config.freeze)
    ways = options(model, config, settings, world_size)
    image_length = model.config.image_context_length
    if tokenizer is None:
        rows = full_rows(config, image_length)
    else:
        rows = open_rows(config, ChatTemplate(tokenizer, model.config.image_token_id, image_length))
    return Plan(config, world_size, model, rows, ways)


def report(plan: Plan, gpu_memory: float, mfu: float, peak: float) -> str:
    """The plan in one screen or two. gpu_memory: bytes of a GPU; peak: its operations a second."""
    train = plan.config.train
    ranks = f"{plan.world_size} rank{'s' * (plan.world_size > 1)}"
    title = f"{plan.config.run.name}: {ranks}, {'bf16' if train.bf16 else 'fp32'}, {plan.config.deepspeed}"
    parts = {
        title: ["Planned, not measured."],
        "data": _data(plan),
        "model": table(plan.model).splitlines(),
        "memory": _memory(plan, gpu_memory),
        "time": _time(plan, gpu_memory, mfu, peak),
        "disk": _disk(plan),
        "recommended": _recommended(plan, gpu_memory),
    }
    return "\n\n".join("\n  ".join([head, *lines]) for head, lines in parts.items())


def _data(plan: Plan) -> list[str]:
    rows, train = plan.rows, plan.config.train
    lines = list(rows.known)
    if train.micro_batch_tokens is None:
        steps = plan.rank_rows // train.micro_batch_size
        cut = f"{plan.world_size} x {steps} x {train.micro_batch_size} (ranks x micro-batches x rows)"
        lines.append(f"a step: {train.global_batch_size:,} rows = {cut}; padding {rows.padding:.0%}")
    else:
        lines.append(f"a step: {train.global_batch_size:,} rows in micro-batches of up to {train.micro_batch_tokens:,} "
                     f"tokens; padding {rows.padding:.0%}")  # fmt: skip
    if rows.epoch_size is not None:
        lines.append(f"steps an epoch: {rows.epoch_size / train.global_batch_size:,.1f}")
        if rows.epoch_size < train.global_batch_size:
            lines.append("an epoch has fewer rows than a step")
    if rows.last_step is not None:
        lines.append(f"steps of the run: {rows.last_step:,}")
        if train.epochs is not None and rows.epoch_size is not None:
            empty = rows.last_step * train.global_batch_size - train.epochs * rows.epoch_size
            lines[-1] += f"; {empty:,} places of the last stay empty"
    return lines


def _memory(plan: Plan, gpu_memory: float) -> list[str]:
    room = usable(gpu_memory)
    every, tokens = plan.recompute_every(room), plan.rows.widest.tokens
    activations = activation_bytes(plan.model, plan.rows.largest_batch(plan.config), every)
    of_batch = (activations.inputs + activations.saved, activations.loss, activations.working)
    bytes_of = [(option, option.sharding.states()) for option in plan.options if option.sharding]
    largest = max(states.total(activations) for _, states in bytes_of)
    unit = unit_of(largest)
    columns = ("weights", "grads", "AdamW", "buffers", "activ.", "loss", "working", "total", "host", "kept", "recomp.")
    lines = [
        f"{unit} a rank, micro-batches of {plan.micro_rows:,.4g} x {tokens:,} tokens, activations "
        f"{in_words(every)}; on the right the largest micro-batch",
        f"on a GPU of {format_bytes(gpu_memory)}, less {FRAGMENTATION:.0%} for fragmentation and "
        f"{format_bytes(CONTEXT_BYTES)} for CUDA's context (both assumed),",
        f"out of the {plan.rank_rows:,} rows of a rank in a step, with activations kept and recomputed",
        f"{'':18}" + "".join(f"{column:>9}" for column in columns),
    ]
    for option, states in bytes_of:
        of_rank = (states.weights, states.gradients, states.optimizer, states.buffers)
        figures = (*of_rank, *of_batch, states.total(activations), states.host)
        fitting = [plan.fitting(option, recomputed, room) for recomputed in (0, 1)]
        lines.append(
            f"{'*' if option.own else ' '} {option.name:16}"
            + "".join(f"{n / UNITS[unit]:9,.2f}" for n in figures) + "".join(f"{n:9,}" for n in fitting)
        )  # fmt: skip
    whole = sum(p.numel() * p.element_size() for p in plan.model.parameters())
    lines += [
        f"* as configured. While the model is loaded, a rank has {format_bytes(whole)} more on its host; while a",
        "checkpoint is written, rank 0 has as much for the weights that train (at the first, for all).",
    ]
    lines += [f"{option.name}: DeepSpeed refuses it with these types" for option in plan.options if not option.sharding]
    if any(option.sharding and option.sharding.zero.stage == 0 for option in plan.options):
        lines.append("ZeRO-0 is there to compare with: the trainer does not run it.")
    return lines


def _time(plan: Plan, gpu_memory: float, mfu: float, peak: float) -> list[str]:
    config, rows = plan.config, plan.rows
    batch = config.train.global_batch_size
    work = step_flops(plan.model, rows.mean * batch, plan.recompute_every(usable(gpu_memory)))
    seconds = work.total / (mfu * peak * plan.world_size)
    hfu = mfu * (work.total + work.recomputed) / work.total
    shares = {"tower": work.tower, "projector": work.projector, "linear layers": work.linear,
              "attention": work.attention, "head": work.head}  # fmt: skip
    lines = [
        f"TFLOP a step: {work.total / 1e12:,.4g} (" + ", ".join(
            f"{name} {part / work.total:.1%}" for name, part in shares.items()) + ")",
        f"recomputed beside that: {work.recomputed / 1e12:,.4g} TFLOP",
        f"at an assumed MFU of {mfu:.0%} (HFU {hfu:.0%}) of {peak / 1e12:,.4g} TFLOP/s a GPU: {seconds:,.3g} s a step, "
        f"{rows.mean.tokens * batch / seconds:,.0f} tokens a second",
    ]  # fmt: skip
    if rows.epoch_size is not None:
        lines.append(f"an epoch: {_duration(seconds * rows.epoch_size / batch)}")
    if rows.last_step is not None:
        lines.append(f"the run: {_duration(seconds * rows.last_step)}, evaluation and checkpoints apart")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.4g} h"


def _disk(plan: Plan) -> list[str]:
    assert plan.own.sharding is not None
    config, found = plan.config.checkpoint, checkpoint_bytes(plan.own.sharding)
    others = max(found.ranks[1:], default=0.0)
    lines = [
        f"frozen weights, once a run: {format_bytes(found.frozen)}",
        f"each checkpoint: {format_bytes(found.each)} (hf/ {format_bytes(found.trained)}; deepspeed/ "
        f"{format_bytes(found.ranks[0])} of rank 0, {format_bytes(others)} of each other)",
    ]
    folder = Path(plan.config.run.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if plan.rows.last_step is None and not (config.keep_last and not config.keep_every):
        return [*lines, "in all: as many as the run saves and keeps; its steps are not known"]
    count = most_checkpoints(config, plan.rows.last_step)
    total = found.frozen + count * found.each
    return [
        *lines,
        f"in all, {count:,} at a time while one is written: {format_bytes(total)}; free in {folder}: "
        f"{format_bytes(free)}" + "  TOO LITTLE" * (total > free),
    ]


def _recommended(plan: Plan, gpu_memory: float) -> list[str]:
    """Whether the run fits as it is set, and what would be fastest: the fewest words over the network and the least
    work twice, as long as micro-batches are of a size."""
    room, own = usable(gpu_memory), plan.own
    largest, every = plan.rows.largest_batch(plan.config), plan.recompute_every(room)
    assert own.sharding is not None
    fits = own.sharding.states().total(activation_bytes(plan.model, largest, every)) <= room
    lines = [f"as configured it {'fits' if fits else 'does NOT fit'}"]
    by_name = {option.name: option for option in plan.options if option.file and option.sharding}
    order = [("ZeRO-2", 0), ("ZeRO-3", 0), ("ZeRO-2", 1), ("ZeRO-3", 1), ("ZeRO-3, offload", 1)]
    best: tuple[int, Option, int] | None = None
    for name, recomputed in order:
        option = by_name[name]
        rows = _divisor(plan.rank_rows, plan.fitting(option, recomputed, room))
        if rows and (best is None or rows > best[0]):
            best = rows, option, recomputed
        if rows * plan.rows.widest.tokens >= ENOUGH_TOKENS or rows == plan.rank_rows:
            break
    if best is None:
        return [*lines, "nothing fits, even a single row: use more ranks, lower data.max_length, or freeze more"]
    rows, option, recomputed = best
    summed = by_name["ZeRO-1"]
    if option.name == "ZeRO-2" and plan.rank_rows >= MANY * rows and plan.fitting(summed, recomputed, room) >= rows:
        option = summed
    train, batch = plan.config.train, f"train.micro_batch_size={rows}"
    if train.micro_batch_tokens is not None:
        batch = f"train.micro_batch_tokens={int(rows * plan.rows.widest.tokens)}"
    elif option.own and recomputed == every and rows == train.micro_batch_size:
        return [*lines, "which is likely to be the fastest way"]
    return [
        *lines,
        "likely to be the fastest way that fits:",
        f"--set deepspeed={option.file} model.activation_checkpointing={str(bool(recomputed)).lower()} {batch}",
    ]


def compared(plan: Plan, measured: "Measured") -> str:
    """What was planned for the measured batch, beside what was measured. plan: for the ranks that measured it."""
    assert plan.own.sharding is not None
    every, states, held = measured.recompute_every, plan.own.sharding.states(), measured.held
    activations = activation_bytes(plan.model, measured.shape, every)
    peak = states.total(activations)
    if not torch.cuda.is_available():  # all is in one memory, the micro-batches that wait their turn too
        peak += states.host + (measured.micro_batches - 1) * activations.inputs
    work = step_flops(plan.model, measured.shape * measured.micro_batches, every)
    of_parts = [("weights", states.weights, held.weights), ("gradients", states.gradients, held.gradients),
                ("AdamW", states.optimizer, held.optimizer)]  # fmt: skip
    if plan.own.sharding.offloads:  # then what is where is not told apart
        planned = states.weights + states.gradients + states.optimizer + states.host
        of_parts = [("all three, offloaded", planned, held.weights + held.gradients + held.optimizer)]
    rows = [*of_parts, ("peak of tensors", peak, measured.peak)]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    lines = [
        f"a step of {measured.micro_batches} x {measured.shape.tokens:,} tokens and {measured.shape.images} pictures "
        f"a rank, world size {plan.world_size}, on {where}",
        f"{'':24}{'planned':>14}{'measured':>14}",
        *(f"{name:24}{format_bytes(ours):>14}{format_bytes(theirs):>14}" for name, ours, theirs in rows),
        f"seconds a step: {measured.seconds:.3g}, {work.total / measured.seconds / 1e12:.3g} TFLOP/s a rank",
    ]
    return "\n  ".join(["measured", *lines])


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not above `most`; 0 if that is 0."""
    return next((n for n in range(min(number, most), 0, -1) if number % n == 0), 0)
