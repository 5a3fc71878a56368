"""From a configuration to a run that can begin, or go on.

setup(config) -> TrainState
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from trainer import checkpoint, rendezvous
from trainer.card import ModelCard
from trainer.config import Config
from trainer.data.lengths import Lengths
from trainer.data.loader import ShardDataset
from trainer.data.order import Geometry, Slot, Stream
from trainer.data.plan import NamedSource, describe
from trainer.data.reader import ShardReader
from trainer.data.samples import Batch
from trainer.data.template import ChatTemplate
from trainer.data.transform import ImageTransform
from trainer.dist import TIMEOUT, World, log, on_main_rank
from trainer.engine import build_engine, deepspeed_settings
from trainer.errors import ConfigError, DataError
from trainer.export import make_processor
from trainer.freeze import describe_trained, freeze, table
from trainer.guard import StepGuard
from trainer.ledger import Ledger
from trainer.load import check_handover, image_transform, load_model
from trainer.memory import Sharding, checkpoint_bytes, usable
from trainer.meters import StepMeter
from trainer.open_data import last_step, open_cache, open_on_all_ranks, open_reader, plan
from trainer.preflight import check_disk
from trainer.recomputation import in_words, planned_recomputation
from trainer.rows import stream_rows
from trainer.run_lock import RunLock
from trainer.saving import Saver
from trainer.stopping import StopRequest
from trainer.tokenizer import load_tokenizer
from trainer.watchdog import Heartbeat, NoHeartbeat


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
    saver: Saver
    last_step: int
    recompute_every: int = 0
    """Layers whose activations are recomputed, as in `is_recomputed`."""
    step: int = 0
    """Optimizer steps done."""
    evaluation_due: bool = False
    """Whether this step's held-out loss was asked for, and is not known yet."""
    saved_step: int | None = None
    """Step of the last checkpoint, if this process has seen it saved or loaded."""
    stop: StopRequest = field(default_factory=StopRequest)
    lock: RunLock | None = None
    """Of the run's folder, on rank 0."""
    beat: Heartbeat | NoHeartbeat = field(default_factory=NoHeartbeat)
    """Of this rank, while it trains."""
    output_dir: Path = field(init=False)
    meter: StepMeter = field(init=False)
    ledger: Ledger = field(init=False)
    guard: StepGuard = field(init=False)

    def __post_init__(self) -> None:
        self.output_dir = Path(self.config.run.output_dir)
        self.ledger = Ledger(
            self.output_dir, self.step, self.run.bad_samples, self.config.data.max_bad_fraction,
            sum(map(len, self.train_data.reader.shards)), self.world.is_main,
        )  # fmt: skip
        train = self.config.train
        self.meter = StepMeter(self.engine.module, self.recompute_every, self.world.device)
        self.guard = StepGuard(train.max_loss_ratio, train.max_skipped_steps, self.run.recent_losses)

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


def setup(
    config: Config, world: World, resume: str = "auto", stop: StopRequest | None = None, saves: bool = True
) -> TrainState:
    """Data, model and engine of a configuration, at the step where training goes on. All ranks call this.

    stop: asks training to end early. saves: whether the disk must have room for checkpoints.

    What can be wrong is checked before the engine is built. Raises ConfigError, DataError or CheckpointError.
    """
    torch.manual_seed(config.run.seed)
    if not (world.is_main and sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
    # A CLIP folder's text tower is no news; weights that are missing are an error of ours.
    transformers.utils.logging.set_verbosity_error()
    data, train, settings = config.data, config.train, deepspeed_settings(config, world)
    resumed_from = on_main_rank(world, lambda: prepare_folder(config, resume))
    cache = open_cache(data)
    sources, held_out = open_on_all_ranks(data, world, cache)

    tokenizer = load_tokenizer(config.model)
    model = load_model(config, tokenizer, resumed_from)
    freeze(model, config.freeze)
    log.info("what trains:\n%s", table(model))
    transform = image_transform(model.config)
    template = ChatTemplate(tokenizer, model.config.image_token_id, model.config.image_context_length)
    reader, held_out_reader = open_reader(sources, data, cache), open_reader(held_out, data, cache, held_out=True)
    stream, lengths = plan(config, world, sources, reader, template)
    geometry = Geometry(
        train.global_batch_size, train.micro_batch_size, world.rank, world.world_size, train.micro_batch_tokens
    )
    sharding = Sharding.of(model, config.optim, settings, world.world_size)
    order = describe(sources, lengths if data.packing else None, data.max_length)
    run = state_of_new_run(config, order, reader, describe_trained(model), sharding)
    run = checkpoint.read_state(resumed_from, run) if resumed_from else run
    steps = last_step(config, stream)
    if saves and run.step < steps:
        on_main_rank(world, lambda: check_disk(config, steps, checkpoint_bytes(sharding), resumed_from))

    def choose(gpu_memory: float) -> int:
        setting = config.model.activation_checkpointing
        try:
            with open_reader(sources, data, cache) as own:  # what it has opened is closed again
                batch = stream_rows(config, sources, stream, own, template, lengths).largest_batch(config)
        except DataError:
            if setting == "auto":
                raise
            return int(setting)  # there was only a warning to give
        return planned_recomputation(model, sharding.states(), batch, setting, usable(gpu_memory))

    every = chosen_recomputation(config, world, choose)
    card = ModelCard.of(config, model)  # before ZeRO-3 cuts the parameters that it counts
    engine = build_engine(model, config, settings, every)
    # A hang is the watchdog's to end, which names who is waited for: NCCL would abort after ten minutes.
    rendezvous.set_timeout(2 * max(TIMEOUT, timedelta(seconds=config.run.hang_seconds)))
    if resumed_from:
        checkpoint.load(engine, resumed_from)
        log.info("resumed from %s", resumed_from)
    processor = make_processor(model, tokenizer, transform, data.system_prompt)
    saver = Saver(
        engine, world, Path(config.run.output_dir), config.checkpoint, processor, card,
        resumed_from, run.frozen,
    )  # fmt: skip
    return TrainState(
        config=config, world=world, engine=engine, tokenizer=tokenizer, transform=transform,
        train_data=ShardDataset(reader, template, transform, data.max_length, data.packing),
        eval_data=ShardDataset(held_out_reader, template, transform, data.max_length) if held_out else None,
        sources=sources, stream=stream, lengths=lengths, geometry=geometry, saver=saver,
        run=dataclasses.replace(run, frozen=saver.frozen.fingerprint), last_step=steps,
        recompute_every=every, step=run.step,
        evaluation_due=run.evaluation_due and bool(held_out and config.eval.every_steps),
        saved_step=run.step if resumed_from else None, stop=StopRequest() if stop is None else stop,
    )  # fmt: skip


def state_of_new_run(
    config: Config, order: str, reader: ShardReader, trained: str, sharding: Sharding
) -> checkpoint.RunState:
    """Before the first step: what a checkpoint to go on from must agree with."""
    return checkpoint.RunState(
        step=0, seed=config.run.seed, global_batch_size=config.train.global_batch_size, order=order,
        shards=[f"{Path(shard.name).name} {shard.digest[:16]}" for shard in reader.shards],
        shard_times=[0 if shard.url else shard.mtime_ns for shard in reader.shards],
        trained=trained, world_size=sharding.world_size, zero_stage=int(sharding.zero.stage),
        sub_group_size=sharding.zero.sub_group_size,
    )  # fmt: skip


def chosen_recomputation(config: Config, world: World, choose: Callable[[float], int]) -> int:
    """Layers whose activations are recomputed, as in `is_recomputed`: as set, or chosen on rank 0 for the memory of its
    GPU. All ranks call this."""
    setting = config.model.activation_checkpointing
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
        every = on_main_rank(world, lambda: choose(memory))
    else:  # a CPU's memory is not known to be this rank's alone
        every = 0 if setting == "auto" else int(setting)
    log.info("activations are %s (model.activation_checkpointing: %s)", in_words(every), str(setting).lower())
    return every


def prepare_folder(config: Config, resume: str) -> Path | None:
    """Makes the run's folder ready, on rank 0: the checkpoint to go on from, or None to start anew, from an export that
    is as it was written."""
    output_dir = Path(config.run.output_dir)
    check_writable(output_dir)
    checkpoint.tidy(output_dir)
    resumed_from = checkpoint.find_resume(output_dir, resume, config.run.overwrite)
    if resume == "none" and config.run.overwrite:
        checkpoint.clear(output_dir)
    if config.model.init_from and not resumed_from:
        check_handover(config.model)
    return resumed_from


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
