"""What an engine really holds and takes, to set beside a plan."""

import gc
import tempfile
import time
import weakref
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.config import Config
from trainer.convert import MASTERS
from trainer.data.lengths import Lengths
from trainer.data.order import MicroBatch, Row, Slot
from trainer.dist import World, on_each_host
from trainer.flops import BatchShape
from trainer.meters import shape_of
from trainer.setup import TrainState, setup
from trainer.train import train_step

PACKS_TRIED = 1000
"""Packs among which the fullest are looked for."""


@dataclass(frozen=True)
class Held:
    """Bytes of a rank, on its accelerator and its host together."""

    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class Measured:
    """Of the second of two steps of the largest micro-batch."""

    held: Held
    peak: int
    """Bytes of tensors at the most, on the accelerator."""
    seconds: float
    micro_batches: int
    shape: BatchShape
    """Of one of its micro-batches."""
    recompute_every: int
    """Layers whose activations were recomputed, as in `is_recomputed`."""


def measure(config: Config, world: World) -> Measured:
    """Takes two steps of the largest micro-batch that the data can give, on the engine that training would have, in a
    run folder that is thrown away. On a CPU one more, in which every allocation is followed. All ranks call this."""
    accumulation = min(2, max(1, config.train.global_batch_size // (config.train.micro_batch_size * world.world_size)))
    size = config.train.micro_batch_size * accumulation * world.world_size
    train = replace(config.train, global_batch_size=size, max_steps=3, epochs=None)
    with tempfile.TemporaryDirectory() as folder:
        run = replace(config.run, output_dir=folder)
        alone = replace(config, run=run, train=train, eval=replace(config.eval, every_steps=0))
        state = setup(alone, world, "none", saves=False)
        try:
            return _measure(state, accumulation)
        finally:
            state.engine.destroy()


def _measure(state: TrainState, accumulation: int) -> Measured:
    engine, rows, found = state.engine, largest_rows(state), []
    batches = [state.train_data.batch(MicroBatch(rows, is_last=n == accumulation)) for n in range(1, accumulation + 1)]
    step = engine.step

    def noting_step() -> None:
        found.append(held(engine))
        step()

    on_cuda = engine.device.type == "cuda"
    engine.train()
    train_step(state, iter(batches))  # with the first step come the optimizer's states
    engine.step = noting_step
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    train_step(state, iter(batches))
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if on_cuda else 0
    if not on_cuda:
        with LiveBytes() as live:
            train_step(state, iter(batches))
        peak = live.peak
    most = Held(found[-1].weights, max(moment.gradients for moment in found), held(engine).optimizer)
    return Measured(most, peak, seconds, accumulation, shape_of(batches[0]), state.recompute_every)


def largest_rows(state: TrainState) -> list[Row]:
    """The rows of the largest micro-batch: the longest samples, or the fullest packs."""
    train, lengths = state.config.train, state.lengths
    if state.config.data.packing:
        assert lengths is not None
        packs = min(PACKS_TRIED, state.stream.sources[0].order.epoch_size)
        rows = [state.stream.row(position) for position in range(packs)]
        rows.sort(key=lambda row: -sum(map(state.row_length, row)))
        return rows[: train.micro_batch_size]
    if lengths is None:
        lengths = Lengths(state.train_data.reader, state.train_data.template)
        on_each_host(state.world, lengths.build)
    of_shards = [lengths.of(number) for number in range(len(state.train_data.reader.shards))]
    slots = [Slot(shard, sample) for shard, of_shard in enumerate(of_shards) for sample in range(len(of_shard))]
    tokens = np.minimum(np.concatenate(of_shards), state.config.data.max_length)
    longest = np.argsort(-tokens, kind="stable")
    if train.micro_batch_tokens is None:
        return [[slots[i]] for i in longest[: train.micro_batch_size]]
    # From every sample on as many as the budget holds at its length: the fullest of these.
    widths = np.maximum(tokens[longest], 1)
    rows_from = np.minimum(train.micro_batch_tokens // widths, np.arange(len(widths), 0, -1))
    start = int(np.argmax(rows_from * widths))
    return [[slots[i]] for i in longest[start : start + max(1, int(rows_from[start]))]]


def held(engine: deepspeed.DeepSpeedEngine) -> Held:
    """What the engine holds now, each storage counted once: between backward pass and step it has its gradients.

    Knows the optimizers of all ZeRO stages by their attributes. (source: DeepSpeed 0.19.8)
    """
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    inner = getattr(optimizer, "optimizer", optimizer)  # without ZeRO in fp32 there is no wrapper

    def named(*attributes: str) -> list[Any]:
        return [getattr(optimizer, attribute, None) for attribute in attributes]

    masters = _tensors(named(*MASTERS, "fp32_groups"))
    buckets = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    gradients = [p.grad for p in [*parameters, *masters]] + [getattr(p, "grad_accum", None) for p in parameters]
    gradients += named(
        "averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer", "fp32_groups_gradients_flat",
        "accumulated_grads_in_cpu",
    )  # fmt: skip
    return Held(
        weights=distinct(
            [getattr(p, "ds_tensor", p) for p in parameters] + named("param_buffer_of_bit16_for_cpu_offload_groups")
        ),
        gradients=distinct(gradients, apart_from=buckets),
        optimizer=distinct([masters, [list(state.values()) for state in inner.state.values()]]),
    )


def distinct(tensors: Any, apart_from: Any = ()) -> int:
    """Bytes of the storages of all tensors in nested lists and dicts."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in _tensors(apart_from)}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, _tensors(tensors))}
    return sum(size for place, size in sizes.items() if place not in left_out)


def _tensors(tree: Any) -> list[torch.Tensor]:
    # DeepSpeed's own kinds of lists are leaves to PyTorch.
    leaves = [x for leaf in tree_leaves(tree) for x in (leaf if isinstance(leaf, list) else [leaf])]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


class LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors while it is entered; `peak` is the most bytes that were alive at once."""

    def __enter__(self) -> "LiveBytes":
        gc.collect()
        self._alive: dict[int, int] = {}
        self._bytes = self.peak = 0
        for found in gc.get_objects():
            # What torch.compile traced with has shapes, and no bytes.
            if issubclass(type(found), torch.Tensor) and not isinstance(found, FakeTensor) and not found.is_meta:
                self._note(found)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            self._note(tensor)
        return output

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self._alive:
            self._alive[key] = storage.nbytes()
            self._bytes += storage.nbytes()
            self.peak = max(self.peak, self._bytes)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._bytes -= self._alive.pop(key, 0)
