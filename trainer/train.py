"""The training loop.

setup(config) -> TrainState -> train(state): fetch, forward, backward, step; now and then evaluate and save
"""

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
import yaml
from transformers import PreTrainedTokenizerBase

from trainer import checkpoint
from trainer.config import Config
from trainer.data.lengths import Lengths
from trainer.data.loader import ShardDataset, batches, fetch
from trainer.data.order import Geometry, Slot, Stream, global_batch, micro_batches
from trainer.data.plan import NamedSource, describe
from trainer.data.samples import Batch
from trainer.data.template import ChatTemplate
from trainer.data.transform import ImageTransform
from trainer.dist import World, gather, log, on_main_rank, raise_together, sum_over_ranks
from trainer.engine import build_engine, deepspeed_settings
from trainer.errors import ConfigError, NumbersError
from trainer.evaluate import count_supervised, held_out_loss
from trainer.freeze import freeze, table
from trainer.ledger import Ledger
from trainer.load import image_transform, load_model, load_tokenizer
from trainer.metrics import Recorder
from trainer.open_data import last_step, open_cache, open_on_all_ranks, open_reader, plan
from trainer.optim import schedule, set_learning_rates
from trainer.preflight import check_disk
from trainer.run_lock import RunLock
from trainer.stopping import Stopped, StopRequest
from trainer.watchdog import Heartbeat, NoHeartbeat

SAVE_SECONDS = 3600
"""A save that takes longer hangs."""


@dataclass
class TrainState:
    """Everything a run holds between two steps."""

    config: Config
    world: World
    engine: deepspeed.DeepSpeedEngine
    tokenizer: PreTrainedTokenizerBase
    transform: ImageTransform
    train_data: ShardDataset
    eval_data: ShardDataset | None
    sources: list[NamedSource]
    stream: Stream
    lengths: Lengths | None
    geometry: Geometry
    run: checkpoint.RunState
    last_step: int
    step: int = 0
    """Optimizer steps done."""
    skipped_steps: int = 0
    """Steps that changed nothing because a gradient was not finite, since the start or resume."""
    skipped_in_a_row: int = 0
    saved_step: int | None = None
    """Step of the last checkpoint, if this process has seen it saved or loaded."""
    stop: StopRequest = field(default_factory=StopRequest)
    lock: RunLock | None = None
    """Of the run's folder, on rank 0."""
    beat: Heartbeat | NoHeartbeat = field(default_factory=NoHeartbeat)
    """Of this rank, while it trains."""
    output_dir: Path = field(init=False)
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.output_dir = Path(self.config.run.output_dir)
        self.ledger = Ledger(
            self.output_dir, self.step, self.run.bad_samples, self.config.data.max_bad_fraction,
            sum(map(len, self.train_data.reader.shards)), self.world.is_main,
        )  # fmt: skip

    @property
    def epochs(self) -> list[float]:
        """Passes done over each source of the stream."""
        counts = self.stream.counts(self.step * self.geometry.global_batch_size)
        return [n / source.order.epoch_size for n, source in zip(counts, self.stream.sources, strict=True)]

    def row_length(self, slot: Slot) -> int:
        """Tokens of a sample as it is trained on, for micro-batches by length."""
        assert self.lengths is not None
        return min(self.lengths(slot), self.config.data.max_length)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """A batch on the device, pixels normalised in the model's dtype."""
        device, dtype = self.engine.device, self.engine.module.multi_modal_projector.linear_1.weight.dtype
        pixel_values = batch["pixel_values"].to(device, non_blocking=True)
        inputs = {
            "input_ids": batch["input_ids"].to(device, non_blocking=True),
            "labels": batch["labels"].to(device, non_blocking=True),
            "pixel_values": self.transform.normalize(pixel_values, dtype),
        }
        if batch["document_ends"] is not None:
            inputs |= packed_inputs(batch["document_ends"], device)
        return inputs


def packed_inputs(document_ends: list[int], device: torch.device) -> dict[str, Any]:
    """What tells the model where the documents of a packed row are: positions (1, T) that start anew in each, their
    bounds (documents + 1,) int32, and the length of the longest."""
    bounds = [0, *document_ends]
    lengths = [end - start for start, end in pairwise(bounds)]
    return {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(device, non_blocking=True),
        "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True),
        "max_length_q": max(lengths),
    }


def setup(config: Config, world: World, resume: str = "auto", stop: StopRequest | None = None) -> TrainState:
    """Data, model and engine of a configuration, at the step where training goes on. All ranks call this.

    stop: asks training to end early.

    What can be wrong is checked before the engine is built. Raises ConfigError, DataError or CheckpointError.
    """
    torch.manual_seed(config.run.seed)
    if not (world.is_main and sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
    # A CLIP folder's text tower is no news; weights that are missing are an error of ours.
    transformers.utils.logging.set_verbosity_error()
    settings = deepspeed_settings(config, world)
    zero_stage = settings.get("zero_optimization", {}).get("stage", 0)
    output_dir = Path(config.run.output_dir)
    on_main_rank(world, lambda: check_writable(output_dir))
    overwrite = config.run.overwrite
    resumed_from = on_main_rank(world, lambda: checkpoint.find_resume(output_dir, resume, overwrite))
    if resume == "none" and overwrite:
        on_main_rank(world, lambda: checkpoint.clear(output_dir))
    data, train = config.data, config.train
    cache = open_cache(data)
    sources, held_out = open_on_all_ranks(data, world, cache)

    tokenizer = load_tokenizer(config.model)
    model = load_model(config, tokenizer, resumed_from)
    freeze(model, config.freeze)
    log.info("%s", table(model))
    on_main_rank(world, lambda: check_disk(model, config))
    transform = image_transform(model)
    template = ChatTemplate(tokenizer, model.config.image_token_id, model.config.image_context_length)
    reader, held_out_reader = open_reader(sources, data, cache), open_reader(held_out, data, cache, held_out=True)
    stream, lengths = plan(config, world, sources, reader, template)
    geometry = Geometry(
        train.global_batch_size, train.micro_batch_size, world.rank, world.world_size, train.micro_batch_tokens
    )
    run = checkpoint.RunState(
        step=0, seed=config.run.seed, global_batch_size=train.global_batch_size,
        order=describe(sources, lengths if data.packing else None, data.max_length),
        shards=[f"{Path(shard.name).name} {shard.digest[:16]}" for shard in reader.shards],
        world_size=world.world_size, zero_stage=zero_stage,
    )  # fmt: skip
    run = checkpoint.read_state(resumed_from, run) if resumed_from else run

    engine = build_engine(model, config, settings)
    if resumed_from:
        checkpoint.load(engine, resumed_from)
        log.info("resumed from %s", resumed_from)
    return TrainState(
        config=config, world=world, engine=engine, tokenizer=tokenizer, transform=transform,
        train_data=ShardDataset(reader, template, transform, data.max_length, data.packing),
        eval_data=ShardDataset(held_out_reader, template, transform, data.max_length) if held_out else None,
        sources=sources, stream=stream, lengths=lengths, geometry=geometry, run=run,
        last_step=last_step(config, stream), step=run.step,
        saved_step=run.step if resumed_from else None, stop=StopRequest() if stop is None else stop,
    )  # fmt: skip


def check_writable(folder: Path) -> None:
    """Makes a folder, if need be, and tries to write in it. Raises ConfigError if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"run.output_dir: {folder} cannot be written to ({error.strerror}); choose another"
        ) from error


def train(state: TrainState, until: int | None = None) -> None:
    """Trains from the state's step to its last, or to an earlier one, and saves there."""
    config, world = state.config, state.world
    until = until or state.last_step
    if world.is_main:
        resolved = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        (state.output_dir / "config.yaml").write_text(resolved, encoding="utf-8")
        (state.output_dir / "deepspeed.json").write_text(json.dumps(state.engine.config, indent=1, default=str) + "\n")
    order = micro_batches(state.stream, state.geometry, state.step, until, state.row_length)
    loader = batches(state.train_data, order, config.data.num_workers, state.engine.device.type == "cuda")
    name, every = config.run.name, config.logging.every_steps
    state.engine.train()
    with (
        Heartbeat(state.output_dir / "heartbeat", world.rank, world.world_size, config.run.hang_seconds) as state.beat,
        Recorder(state.output_dir, name, state.step, state.last_step, every, world.is_main) as recorder,
    ):
        try:
            while state.step < until:
                line = train_step(state, loader)
                if config.logging.sample_keys:
                    on_main_rank(world, partial(add_sample_keys, state, line))
                recorder.step(line)
                check_numbers(state)
                is_last = state.step == until
                # While steps are skipped, the checkpoint from before the trouble is not to be pushed out.
                if is_last or (state.step % config.checkpoint.save_steps == 0 and not state.skipped_in_a_row):
                    save(state, recorder)
                if state.eval_data and is_due(state.step, config.eval.every_steps, is_last):
                    recorder.evaluation(state.step, evaluate(state))
        except Stopped:
            log.info("asked to stop (%s)", state.stop.signal or "another rank")
            if state.saved_step != state.step:
                save(state, recorder)
            raise


def is_due(step: int, every_steps: int, is_last: bool) -> bool:
    """Whether something done every so many steps (0: never) is done at this one."""
    return every_steps > 0 and (is_last or step % every_steps == 0)


def train_step(state: TrainState, loader: Iterator[Batch]) -> dict:
    """One optimizer step; its loss is the mean over the step's supervised tokens, over all ranks and micro-batches."""
    engine, started = state.engine, time.perf_counter()
    state.beat("fetch", state.step + 1)
    micro, found = fetch(loader)
    failure = found or (state.lock.failure if state.lock else None)
    data_time = time.perf_counter() - started
    here = [
        sum(map(count_supervised, micro)), sum(b["tokens"] for b in micro),
        sum(len(b["pixel_values"]) for b in micro), sum(b["truncated_samples"] for b in micro),
        sum(b["truncated_tokens"] for b in micro), sum(len(b["rejected"]) for b in micro), failure is not None,
        bool(state.stop),
    ]  # fmt: skip
    totals = sum_over_ranks(list(map(float, here)), engine.device)
    supervised, tokens, images, truncated, truncated_tokens, bad, failures, stops = map(int, totals)
    if failures:
        raise_together(failure)
    if stops:
        raise Stopped

    seed_step(state.config.run.seed, state.step, state.world.rank)
    factor = schedule(state.step, state.last_step, state.config.optim)
    learning_rate = set_learning_rates(engine.optimizer, factor)
    losses = forward_backward(state, micro, max(1, supervised))
    state.step += 1
    not_finite = note_skipped(state, micro, losses)
    if bad:  # now that the step counts: one that was broken off is taken again
        rejected = [sample for b in micro for sample in b["rejected"]]
        state.ledger.record(state.step, rejected, samples_seen(state, state.step))
    (loss,) = sum_over_ranks([sum(losses)], engine.device)
    return {
        "step": state.step,
        **epochs_done(state),
        "loss": loss,
        "grad_norm": float(engine.get_global_grad_norm() or 0.0) if engine.was_step_applied() else None,
        "learning_rate": learning_rate,
        "supervised_tokens": supervised,
        "tokens": tokens,
        "images": images,
        "truncated_samples": truncated,
        "truncated_tokens": truncated_tokens,
        "bad_samples": bad,
        "skipped_steps": state.skipped_steps,
        **({"not_finite": not_finite} if not_finite else {}),
        "step_time": round(time.perf_counter() - started, 4),
        "data_time": round(data_time, 4),
    }


def forward_backward(state: TrainState, micro: list[Batch], supervised: int) -> list[float]:
    """The update of a step, out of its micro-batches; their parts of the loss. Raises Stopped between two of them."""
    engine, losses = state.engine, []
    for batch in micro:
        state.beat("forward and backward", state.step + 1, batch["keys"])
        output = engine(**state.inputs(batch), loss_only=True, use_cache=False, num_items_in_batch=supervised)
        losses.append(output.loss.item())
        # Micro-batches may differ in number from step to step.
        engine.set_gradient_accumulation_boundary(batch["is_last"])
        # The engine will divide by the ranks and, unless told not to, by the accumulation steps: undo the first,
        # forbid the second, and what is left is the plain sum of the parts of the mean.
        engine.backward(output.loss * state.world.world_size, scale_wrt_gas=False)
        engine.step()
        # What is accumulated is thrown away: a resumed run takes the whole step again.
        if not batch["is_last"] and sum_over_ranks([float(bool(state.stop))], engine.device) != [0.0]:
            raise Stopped
    return losses


def note_skipped(state: TrainState, micro: list[Batch], losses: list[float]) -> list[str]:
    """Counts a step that DeepSpeed skipped, on all ranks alike; the keys of its samples whose loss is not finite, or
    of all where only a gradient is not. Empty if the step was applied."""
    if state.engine.was_step_applied():
        state.skipped_in_a_row = 0
        return []
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    keys = [(key, math.isfinite(loss)) for b, loss in zip(micro, losses, strict=True) for key in b["keys"]]
    keys = [entry for of_rank in gather(keys) for entry in of_rank]
    found = [key for key, is_finite in keys if not is_finite] or [key for key, _ in keys]
    log.warning("step %d was skipped: not finite with %s", state.step, ", ".join(found[:16]))
    return found


def check_numbers(state: TrainState) -> None:
    """Raises NumbersError after too many skipped steps in a row."""
    if state.skipped_in_a_row >= state.config.train.max_skipped_steps:
        raise NumbersError(
            f"{state.skipped_in_a_row} steps in a row, up to step {state.step}, had a loss or gradient that is not "
            f"finite (train.max_skipped_steps); metrics.jsonl names their samples under not_finite, "
            f"launch/inspect_step.py shows them. The newest checkpoint is from before: lower the learning rate, or "
            f"leave out what is wrong, and go on from it",
            on_all_ranks=True,
        )


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


def evaluate(state: TrainState) -> float:
    """The held-out loss now. All ranks call this."""
    assert state.eval_data is not None
    config = state.config
    loss, rejected = held_out_loss(
        state.engine, state.eval_data, config.eval.samples, config.train.micro_batch_size, config.data.num_workers,
        state.inputs, state.stop, lambda batch: state.beat("evaluate", state.step, batch["keys"]),
    )  # fmt: skip
    state.ledger.record_held_out(state.step, rejected)
    if config.checkpoint.keep_best and state.world.is_main:
        checkpoint.note_best(state.output_dir, state.step, loss)
    return loss


def save(state: TrainState, recorder: Recorder) -> None:
    """A checkpoint of now. All ranks call this."""
    started = time.perf_counter()
    run = dataclasses.replace(state.run, step=state.step, bad_samples=dict(state.ledger.counts))
    retention = state.config.checkpoint
    # Longer than any file system is away; gathering and writing beat nowhere.
    with state.beat.phase("save", limit=max(SAVE_SECONDS, state.config.run.hang_seconds)):
        checkpoint.save(state.engine, state.output_dir, run, state.tokenizer, state.transform, retention)
    state.saved_step = state.step
    recorder.pause(state.step, time.perf_counter() - started)


def add_sample_keys(state: TrainState, line: dict) -> None:
    """Adds to the line of a step the keys of its whole global batch, in order, those of bad samples too."""
    rows = global_batch(state.stream, line["step"] - 1, state.geometry.global_batch_size)
    line["samples"] = [state.train_data.reader.key(slot) for row in rows for slot in row]
