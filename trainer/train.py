"""The training loop.

TrainState (of setup) -> train(state): fetch, forward, backward, step; now and then evaluate and save
"""

import dataclasses
import hashlib
import json
import math
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from functools import partial
from typing import Any

import torch
from torch.profiler import record_function

from trainer.answers import Question, held_out_answers
from trainer.data.loader import BatchLoader, fetch
from trainer.data.order import global_batch, micro_batches
from trainer.data.samples import Batch
from trainer.dist import ask_ranks, gather, log, on_main_rank, raise_together, sum_over_ranks
from trainer.engine import forget_gradients
from trainer.errors import DataError, UserError
from trainer.evaluate import count_supervised, held_out_loss
from trainer.metrics import Recorder
from trainer.optim import schedule, set_learning_rates
from trainer.profiling import profiled
from trainer.setup import TrainState
from trainer.stopping import Stopped
from trainer.watchdog import Heartbeat

SAVE_SECONDS = 3600
"""A save that takes longer hangs."""


def train(state: TrainState, until: int | None = None, profile_steps: int = 0) -> None:
    """Trains from the state's step to its last, or to an earlier one, and saves there. profile_steps:
    so many of its steps are profiled, from the third on (see `profiled`)."""
    config, world = state.config, state.world
    until = until or state.last_step
    if world.is_main:
        changed = config.write(state.output_dir / "config.yaml")
        if state.step and changed:
            log.info("settings that differ from those of the last start:\n  %s", "\n  ".join(changed))
        (state.output_dir / "deepspeed.json").write_text(json.dumps(state.engine.config, indent=1, default=str) + "\n")
    order = micro_batches(state.stream, state.geometry, state.step, until, state.row_length)
    name, every = config.run.name, config.logging.every_steps
    start = on_main_rank(world, lambda: uuid.uuid4().hex)
    state.engine.train()
    with (
        # The workers are forked before anything starts threads.
        closing(BatchLoader(state.train_data, order, config.data.num_workers, world.device.type == "cuda")) as loader,
        Heartbeat(
            state.output_dir / "heartbeat", world.rank, world.world_size, config.run.hang_seconds, start
        ) as state.beat,
        Recorder(state.output_dir, name, state.step, state.last_step, every, world.is_main) as recorder,
        profiled(profile_steps, state.output_dir / "profile", world.rank) as note_profile,
    ):
        try:
            if state.evaluation_due:
                save(state, recorder, evaluate_and_record(state, recorder))
            while state.step < until:
                line = train_step(state, loader)
                note_profile(line)
                if config.logging.sample_keys:
                    on_main_rank(world, partial(add_sample_keys, state, line))
                recorder.step(line)
                state.guard.check(state.step)
                is_last, held_out = state.step == until, None
                if state.eval_data and is_due(state.step, config.eval.every_steps, is_last):
                    held_out = evaluate_and_record(state, recorder)
                # While steps are skipped, the checkpoint from before the trouble is not to be pushed out.
                if is_last or (state.step % config.checkpoint.save_steps == 0 and not state.guard.skipped_in_a_row):
                    save(state, recorder, held_out)
            with saving(state):
                state.saver.wait()
        except Stopped:
            log.info("asked to stop (%s)", state.stop.signal or "another rank")
            if state.saved_step != state.step:
                save(state, recorder)
            with saving(state):
                state.saver.wait()
            raise
        except UserError as error:
            if error.on_all_ranks:  # all are here: a checkpoint on its way is not to be lost with the run
                with saving(state):
                    state.saver.settle()
            raise
        except Exception:
            state.saver.join()
            raise
        finally:  # one that ends at once, by Ctrl-C, does not wait
            state.saver.abandon()


def is_due(step: int, every_steps: int, is_last: bool) -> bool:
    """Whether something done every so many steps (0: never) is done at this one."""
    return every_steps > 0 and (is_last or step % every_steps == 0)


def train_step(state: TrainState, loader: Iterator[Batch]) -> dict:
    """One optimizer step; its loss is the mean over the step's supervised tokens, over all ranks and micro-batches."""
    engine, meter, started = state.engine, state.meter, time.perf_counter()
    state.beat("fetch", state.step + 1)
    with record_function("data"):
        micro, found = fetch(loader)
    failure = found or (state.lock.failure if state.lock else None) or state.saver.failure
    data_time = time.perf_counter() - started
    here = [
        sum(map(count_supervised, micro)), sum(b["tokens"] for b in micro),
        sum(len(b["pixel_values"]) for b in micro), sum(b["truncated_samples"] for b in micro),
        sum(b["truncated_tokens"] for b in micro), sum(len(b["rejected"]) for b in micro), failure is not None,
        bool(state.stop), len(micro), len(micro) ** 2,
    ]  # fmt: skip
    *totals, needed, computed = sum_over_ranks([*map(float, here), *meter.operations(micro)], engine.device)
    supervised, tokens, images, truncated, truncated_tokens, bad, failures, stops, batches, squares = map(int, totals)
    if failures:
        raise_together(failure)
    if squares * state.world.world_size != batches**2:  # equal only where all have as many
        raise uneven(state.step + 1, gather((len(micro), [key for b in micro for key in b["keys"]])))
    if stops:
        raise Stopped

    seed_step(state.config.run.seed, state.step, state.world.rank)
    factor = schedule(state.step, state.last_step, state.config.optim)
    learning_rate = set_learning_rates(engine.optimizer, factor)
    loss, losses = forward_backward(state, micro, max(1, supervised))
    state.step += 1
    applied = engine.was_step_applied()
    if not applied:
        forget_gradients(engine)
    trouble = state.guard.note(state.step, applied, loss, micro, losses)
    if bad:  # now that the step counts: one that was broken off is taken again
        rejected = [sample for b in micro for sample in b["rejected"]]
        state.ledger.record(state.step, rejected, samples_seen(state, state.step))
    times, seconds = meter.times(), time.perf_counter() - started
    return {
        "step": state.step,
        **epochs_done(state),
        "loss": loss,
        "grad_norm": float(engine.get_global_grad_norm() or 0.0) if applied else None,
        "learning_rate": learning_rate,
        "supervised_tokens": supervised,
        "tokens": tokens,
        "images": images,
        "truncated_samples": truncated,
        "truncated_tokens": truncated_tokens,
        "bad_samples": bad,
        "skipped_steps": state.guard.skipped,
        **trouble,
        "step_time": round(seconds, 4),
        "data_time": round(data_time, 4),
        **times,
        **meter.shares(needed, computed, seconds, state.world.world_size),
    }


def forward_backward(state: TrainState, micro: list[Batch], supervised: int) -> tuple[float, list[float]]:
    """The update of a step, out of its micro-batches: the step's loss, and this rank's parts of it by micro-batch.

    Raises Stopped between two of them.
    """
    # Losses and the answer of the ranks are looked at as late as can be: until the host knows, a GPU has nothing to do.
    engine, meter = state.engine, state.meter
    losses: list[torch.Tensor] = []
    step_loss: float | None = None
    stops: torch.Tensor | None = None
    for batch in micro:
        state.beat("forward and backward", state.step + 1, batch["keys"])
        with meter.timed("forward"):
            output = engine(**state.inputs(batch), loss_only=True, use_cache=False, num_items_in_batch=supervised)
        losses.append(output.loss.detach())
        # The engine will divide by the ranks and, unless told not to, by the accumulation steps: undo the first,
        # forbid the second, and what is left is the plain sum of the parts of the mean.
        loss = output.loss * state.world.world_size
        if batch["is_last"] and state.guard.max_loss_ratio is not None:
            step_loss = whole_loss(losses)
            if state.guard.is_spike(step_loss):
                loss = loss * math.nan  # whose gradients the engine skips, on all ranks, as it does where they come so
        # Micro-batches may differ in number from step to step.
        engine.set_gradient_accumulation_boundary(batch["is_last"])
        with meter.timed("backward"):
            engine.backward(loss, scale_wrt_gas=False)
        with meter.timed("optimizer"):
            engine.step()
        if not batch["is_last"]:
            answered, stops = stops, ask_ranks(bool(state.stop), engine.device)
            # What is accumulated is thrown away: a resumed run takes the whole step again.
            if answered is not None and answered.item():
                raise Stopped
    return whole_loss(losses) if step_loss is None else step_loss, torch.stack(losses).tolist()


def whole_loss(losses: list[torch.Tensor]) -> float:
    """A step's loss, of this rank's parts of it by micro-batch. All ranks call this."""
    (loss,) = sum_over_ranks([sum(torch.stack(losses).tolist())], losses[0].device)
    return loss


def uneven(step: int, batches: list[tuple[int, list[str]]]) -> DataError:
    """Of a step whose micro-batches differ in number: the ranks that have fewer would leave the others waiting.

    batches: by rank, how many, and the keys of their samples.
    """
    rows = [f"  rank {rank}: {n} with {', '.join(keys[:8])}" for rank, (n, keys) in enumerate(batches)]
    return DataError(
        f"step {step}: the ranks have different numbers of micro-batches, and would wait for each other for ever:\n"
        + "\n".join(rows) + "\nThe data must be the same on every host; if it is, this is a fault of the trainer",
        on_all_ranks=True,
    )  # fmt: skip


def epochs_done(state: TrainState) -> dict[str, Any]:
    """Passes over the data; of weighted sources the fewest, and each one's own."""
    epochs = [round(epoch, 6) for epoch in state.epochs]
    if len(epochs) == 1:
        return {"epoch": epochs[0]}
    return {"epoch": min(epochs), "epochs": {s.name: epoch for s, epoch in zip(state.sources, epochs, strict=True)}}


def samples_seen(state: TrainState, step: int) -> int:
    """Samples of the steps up to this one; in packs there are some more or fewer of them than on average."""
    counts = state.stream.counts(step * state.geometry.global_batch_size)
    sizes = [len(shard) for source in state.sources for shard in source.shards]
    if len(counts) == 1:
        return counts[0] * sum(sizes) // state.stream.sources[0].order.epoch_size
    return sum(
        count * sum(map(len, named.shards)) // source.order.epoch_size
        for count, named, source in zip(counts, state.sources, state.stream.sources, strict=True)
    )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout's randomness as a function of (seed, step, rank), so that resuming needs no generator's state."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "little") >> 1)


def evaluate(state: TrainState) -> tuple[float, list[tuple[Question, str]]]:
    """The held-out loss, and answers, now. All ranks call this."""
    assert state.eval_data is not None
    config, step = state.config, state.step
    loss, rejected = held_out_loss(
        state.engine, state.eval_data, config.eval.samples, config.train.micro_batch_size, config.data.num_workers,
        state.inputs, state.stop, lambda batch: state.beat("evaluate", step, batch["keys"]),
    )  # fmt: skip
    answered = held_out_answers(
        state.engine, state.world, state.eval_data, config.eval.answers, config.eval.max_new_tokens, state.stop,
        lambda keys: state.beat("generate", step, keys),
    )  # fmt: skip
    state.ledger.record_held_out(step, rejected)
    return loss, answered


def evaluate_and_record(state: TrainState, recorder: Recorder) -> float:
    """An evaluation within training: its loss. One that is broken off is due when the run goes on."""
    state.evaluation_due = True
    loss, answered = evaluate(state)
    state.evaluation_due = False
    recorder.evaluation(state.step, loss)
    recorder.answers(state.step, answered)
    return loss


def save(state: TrainState, recorder: Recorder, held_out_loss: float | None = None) -> None:
    """A checkpoint of now, with its held-out loss, if that is known. All ranks call this."""
    started = time.perf_counter()
    run = dataclasses.replace(
        state.run, step=state.step, bad_samples=dict(state.ledger.counts),
        recent_losses=list(state.guard.recent_losses), evaluation_due=state.evaluation_due,
    )  # fmt: skip
    with saving(state):
        state.saver.save(run, held_out_loss, state.lock)
    state.saved_step = state.step
    recorder.pause(state.step, time.perf_counter() - started)


def saving(state: TrainState) -> AbstractContextManager[None]:
    """While a checkpoint is written or waited for: gathering and writing beat nowhere, and file systems are away at
    times."""
    return state.beat.phase("save", limit=max(SAVE_SECONDS, state.config.run.hang_seconds))


def add_sample_keys(state: TrainState, line: dict) -> None:
    """Adds to the line of a step the keys of its whole global batch, in order, those of bad samples too."""
    rows = global_batch(state.stream, line["step"] - 1, state.geometry.global_batch_size)
    line["samples"] = [state.train_data.reader.key(slot) for row in rows for slot in row]
