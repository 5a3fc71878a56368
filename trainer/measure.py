"""What an engine really holds and takes, to set beside a plan."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Held:
    """Bytes of a rank, on its accelerator and its host together."""

    weights: int
    gradients: int
    optimizer: int


def held(engine: deepspeed.DeepSpeedEngine) -> Held:
    """What the engine holds now, each storage counted once: between backward pass and step it has its gradients.

    Knows the optimizers of all ZeRO stages by their attributes. (source: DeepSpeed 0.19.8)
    """
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    inner = getattr(optimizer, "optimizer", optimizer)  # without ZeRO in fp32 there is no wrapper

    def named(*attributes: str) -> Iterator[Any]:
        return (getattr(optimizer, attribute, None) for attribute in attributes)

    masters = tree_leaves(
        list(named("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"))
    )
    buckets = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    gradients = [p.grad for p in [*parameters, *masters] if isinstance(p, torch.Tensor)]
    gradients += [getattr(p, "grad_accum", None) for p in parameters]
    gradients += named(
        "averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer", "fp32_groups_gradients_flat",
        "accumulated_grads_in_cpu",
    )  # fmt: skip
    return Held(
        weights=distinct([getattr(p, "ds_tensor", p) for p in parameters]),
        gradients=distinct(gradients, apart_from=buckets),
        optimizer=distinct([masters, [list(state.values()) for state in inner.state.values()]]),
    )


def distinct(tensors: Any, apart_from: Any = ()) -> int:
    """Bytes of the storages of all tensors in nested lists and dicts."""
    left_out = {storage.data_ptr() for storage in _storages(apart_from)}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in _storages(tensors)}
    return sum(size for place, size in sizes.items() if place not in left_out)


def _storages(tensors: Any) -> Iterable[torch.UntypedStorage]:
    # A group of gradients in one flat buffer is a list of a kind that the tree of PyTorch takes for a leaf.
    leaves = [x for leaf in tree_leaves(tensors) for x in (leaf if isinstance(leaf, list) else [leaf])]
    return (leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor))
