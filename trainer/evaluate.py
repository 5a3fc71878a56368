"""The held-out loss: the mean over all supervised tokens of the same samples, whatever the number of ranks."""

from collections.abc import Callable

import deepspeed
import torch

from trainer.data.loader import ShardDataset, batches
from trainer.data.order import Geometry, Order, micro_batches
from trainer.data.samples import Batch
from trainer.dist import sum_over_ranks


@torch.no_grad()
def held_out_loss(
    engine: deepspeed.DeepSpeedEngine,
    dataset: ShardDataset,
    samples: int,
    micro_batch_size: int,
    num_workers: int,
    inputs: Callable[[Batch], dict[str, torch.Tensor]],
) -> float:
    """Mean cross-entropy of the first `samples` held-out samples (0: all). All ranks call this and get the same value.

    inputs: moves a batch to the device.
    """
    sizes = [len(shard) for shard in dataset.shards]
    samples = min(samples or sum(sizes), sum(sizes))
    order = Order(sizes, seed=None, end=samples)
    world_size = engine.world_size
    geometry = Geometry(micro_batch_size * world_size, micro_batch_size, engine.global_rank, world_size)
    steps = -(-samples // geometry.global_batch_size)
    loss, supervised = 0.0, 0
    engine.eval()
    for batch in batches(dataset, micro_batches(order, geometry, 0, steps), num_workers):
        loss += engine(**inputs(batch), loss_only=True, use_cache=False, num_items_in_batch=1).loss.item()
        supervised += count_supervised(batch)
    engine.train()
    total, tokens = sum_over_ranks([loss, supervised], engine.device)
    return total / max(1, tokens)


def count_supervised(batch: Batch) -> int:
    """Tokens that the model is to predict: every label but one in the first place, which nothing precedes."""
    return int((batch["labels"][:, 1:] >= 0).sum())
