"""The held-out loss: the mean over all supervised tokens of the same samples, whatever the number of ranks."""

from collections.abc import Callable
from contextlib import closing

import deepspeed
import torch

from trainer.data.loader import BatchLoader, ShardDataset, fetch
from trainer.data.order import Geometry, micro_batches
from trainer.data.plan import NamedSource, make_stream
from trainer.data.samples import Batch, Rejected
from trainer.dist import raise_together, sum_over_ranks
from trainer.errors import DataError
from trainer.stopping import Stopped, StopRequest


@torch.no_grad()
def held_out_loss(
    engine: deepspeed.DeepSpeedEngine,
    dataset: ShardDataset,
    samples: int,
    micro_batch_size: int,
    num_workers: int,
    inputs: Callable[[Batch], dict[str, torch.Tensor]],
    stop: StopRequest,
    beat: Callable[[Batch], None],
) -> tuple[float, list[Rejected]]:
    """Mean cross-entropy of the first `samples` held-out samples (0: all), the same on every rank; and the samples of
    this rank that could not be used. All ranks call this. Raises DataError where nothing could be predicted.

    inputs: moves a batch to the device. stop: asks for an early end, by the exception Stopped.
    beat: is told of each batch.
    """
    sizes = [len(shard) for shard in dataset.reader.shards]
    samples = min(samples or sum(sizes), sum(sizes))
    stream = make_stream([NamedSource("eval", list(dataset.reader.shards))], seed=None)
    stream.end = samples
    world_size = engine.world_size
    geometry = Geometry(micro_batch_size * world_size, micro_batch_size, engine.global_rank, world_size)
    steps = -(-samples // geometry.global_batch_size)
    loss, supervised = 0.0, 0
    rejected: list[Rejected] = []
    engine.eval()
    try:
        with closing(BatchLoader(dataset, micro_batches(stream, geometry, 0, steps), num_workers)) as loader:
            for _ in range(steps):
                micro, failure = fetch(loader)
                failures, stops = sum_over_ranks([float(failure is not None), float(bool(stop))], engine.device)
                if failures:
                    raise_together(failure)
                if stops:
                    raise Stopped
                (batch,) = micro
                beat(batch)
                loss += engine(**inputs(batch), loss_only=True, use_cache=False, num_items_in_batch=1).loss.item()
                supervised += count_supervised(batch)
                rejected += batch["rejected"]
    finally:
        engine.train()
    total, tokens = sum_over_ranks([loss, supervised], engine.device)
    if not tokens:
        raise DataError(
            "data.eval: no held-out sample has a token to predict: `launch/prepare_shards.py verify` says why",
            on_all_ranks=True,
        )
    return total / tokens, rejected


def count_supervised(batch: Batch) -> int:
    """Tokens that the model is to predict: every label but one in the first place, which nothing precedes."""
    return int((batch["labels"][:, 1:] >= 0).sum())
