"""The training loop.

setup(config) -> TrainState -> train(state): fetch, forward, backward, step; now and then evaluate and save
"""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed
import torch
import transformers
import yaml
from transformers import PreTrainedTokenizerBase

from trainer import checkpoint
from trainer.config import Config, ShardsConfig, expand_shards
from trainer.data.index import ShardIndex, open_index
from trainer.data.loader import ShardDataset, batches
from trainer.data.order import Geometry, Order, global_batch, micro_batches
from trainer.data.samples import Batch
from trainer.data.template import ChatTemplate
from trainer.data.transform import ImageTransform
from trainer.dist import World, log, on_main_rank, sum_over_ranks
from trainer.engine import build_engine, deepspeed_settings
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.evaluate import count_supervised, held_out_loss
from trainer.freeze import freeze, table
from trainer.load import image_transform, load_model, load_tokenizer
from trainer.metrics import Recorder
from trainer.optim import schedule, set_learning_rates


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
    order: Order
    geometry: Geometry
    run: checkpoint.RunState
    last_step: int
    step: int = 0
    """Optimizer steps done."""
    skipped_steps: int = 0
    """Steps that changed nothing because a gradient was not finite, since the start or resume."""
    output_dir: Path = field(init=False)

    def __post_init__(self) -> None:
        self.output_dir = Path(self.config.run.output_dir)

    @property
    def samples(self) -> int:
        """Samples seen, fillers left out."""
        samples = self.step * self.geometry.global_batch_size
        return samples if self.order.end is None else min(samples, self.order.end)

    def inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """A batch on the device, pixels normalised in the model's dtype."""
        device, dtype = self.engine.device, self.engine.module.multi_modal_projector.linear_1.weight.dtype
        pixel_values = batch["pixel_values"].to(device, non_blocking=True)
        return {
            "input_ids": batch["input_ids"].to(device, non_blocking=True),
            "labels": batch["labels"].to(device, non_blocking=True),
            "pixel_values": self.transform.normalize(pixel_values, dtype),
        }


def setup(config: Config, world: World, resume: str = "auto") -> TrainState:
    """Data, model and engine of a configuration, at the step where training goes on. All ranks call this.

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
    resumed_from = checkpoint.find_resume(output_dir, resume)
    train_shards = open_shards(config.data.train, world)
    eval_shards = open_shards(config.data.eval, world)

    tokenizer = load_tokenizer(config.model)
    model = load_model(config, tokenizer, resumed_from)
    freeze(model, config.freeze)
    log.info("%s", table(model))
    transform = image_transform(model)
    template = ChatTemplate(tokenizer, model.config.image_token_id, model.config.image_context_length)

    def dataset(shards: list[ShardIndex]) -> ShardDataset:
        data = config.data
        return ShardDataset(shards, template, transform, data.max_length, data.system_prompt, data.caption_prompt)

    train = config.train
    geometry = Geometry(train.global_batch_size, train.micro_batch_size, world.rank, world.world_size)
    samples = sum(map(len, train_shards))
    if not samples:
        raise DataError("data.train: the shards hold no sample")
    end = train.epochs * samples if train.epochs else None
    last_step = train.max_steps or -(-(end or 0) // train.global_batch_size)
    run = checkpoint.RunState(
        0, config.run.seed, train.global_batch_size, fingerprint(train_shards), world.world_size, zero_stage
    )
    run = checkpoint.read_state(resumed_from, run) if resumed_from else run

    engine = build_engine(model, config, settings)
    if resumed_from:
        checkpoint.load(engine, resumed_from)
        log.info("resumed from %s", resumed_from)
    return TrainState(
        config=config, world=world, engine=engine, tokenizer=tokenizer, transform=transform,
        train_data=dataset(train_shards), eval_data=dataset(eval_shards) if eval_shards else None,
        order=Order([len(shard) for shard in train_shards], config.run.seed, end), geometry=geometry,
        run=run, last_step=last_step, step=run.step,
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


def open_shards(sources: list[ShardsConfig], world: World) -> list[ShardIndex]:
    """Indexes of all tars of the sources, in the order of the configuration; rank 0 makes the missing ones."""
    tars = [tar for source in sources for tar in expand_shards(source.shards)]
    indexes: list[ShardIndex] = []
    on_main_rank(world, lambda: indexes.extend(map(open_index, tars)))
    return indexes or [open_index(tar) for tar in tars]


def fingerprint(shards: list[ShardIndex]) -> str:
    """Hash of names and keys: the same only for the same samples in the same places."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.name}:{len(shard)}:".encode() + shard.key_bytes.tobytes())
    return digest.hexdigest()[:16]


def train(state: TrainState, until: int | None = None) -> None:
    """Trains from the state's step to its last, or to an earlier one, and saves there."""
    config, world = state.config, state.world
    until = until or state.last_step
    if world.is_main:
        resolved = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        (state.output_dir / "config.yaml").write_text(resolved, encoding="utf-8")
        (state.output_dir / "deepspeed.json").write_text(json.dumps(state.engine.config, indent=1, default=str) + "\n")
    slots = micro_batches(state.order, state.geometry, state.step, until)
    loader = batches(state.train_data, slots, config.data.num_workers, state.engine.device.type == "cuda")
    name, every = config.run.name, config.logging.every_steps
    state.engine.train()
    with Recorder(state.output_dir, name, state.step, state.last_step, every, world.is_main) as recorder:
        while state.step < until:
            line = train_step(state, loader)
            if config.logging.sample_keys:
                line["samples"] = sample_keys(state, state.step - 1)
            recorder.step(line)
            is_last = state.step == until
            if is_last or state.step % config.checkpoint.save_steps == 0:
                save(state)
            if state.eval_data and is_due(state.step, config.eval.every_steps, is_last):
                recorder.evaluation(state.step, evaluate(state))


def is_due(step: int, every_steps: int, is_last: bool) -> bool:
    """Whether something done every so many steps (0: never) is done at this one."""
    return every_steps > 0 and (is_last or step % every_steps == 0)


def train_step(state: TrainState, loader: Iterator[Batch]) -> dict:
    """One optimizer step; its loss is the mean over the step's supervised tokens, over all ranks and micro-batches."""
    engine, started = state.engine, time.perf_counter()
    micro, failure = fetch(loader, state.geometry.accumulation_steps)
    data_time = time.perf_counter() - started
    counts = [count_supervised(b) for b in micro], [b["tokens"] for b in micro], [len(b["pixel_values"]) for b in micro]
    truncated_here = sum(b["truncated_tokens"] for b in micro)
    here = [*map(sum, counts), truncated_here, failure is not None]
    supervised, tokens, images, truncated, failures = map(int, sum_over_ranks(list(map(float, here)), engine.device))
    if failures:
        raise failure or CheckpointError("another rank found a bad sample")

    seed_step(state.config.run.seed, state.step, state.world.rank)
    factor = schedule(state.step, state.last_step, state.config.optim)
    learning_rate = set_learning_rates(engine.optimizer, factor)
    loss = 0.0
    for batch in micro:
        output = engine(**state.inputs(batch), loss_only=True, use_cache=False, num_items_in_batch=max(1, supervised))
        loss += output.loss.item()
        # The engine will divide by the ranks and, unless told not to, by the accumulation steps: undo the first,
        # forbid the second, and what is left is the plain sum of the parts of the mean.
        engine.backward(output.loss * state.world.world_size, scale_wrt_gas=False)
        engine.step()
    state.step += 1
    if not engine.was_step_applied():
        state.skipped_steps += 1
        log.warning("step %d was skipped: a gradient is not finite", state.step)
    (loss,) = sum_over_ranks([loss], engine.device)
    return {
        "step": state.step,
        "epoch": round(state.samples / state.order.epoch_size, 6),
        "loss": loss,
        "grad_norm": float(engine.get_global_grad_norm() or 0.0) if engine.was_step_applied() else None,
        "learning_rate": learning_rate,
        "supervised_tokens": supervised,
        "tokens": tokens,
        "images": images,
        "truncated_tokens": truncated,
        "skipped_steps": state.skipped_steps,
        "step_time": round(time.perf_counter() - started, 4),
        "data_time": round(data_time, 4),
    }


def fetch(loader: Iterator[Batch], count: int) -> tuple[list[Batch], DataError | None]:
    """The next batches, or the error that one of them met: all ranks are to hear of it before they leave together."""
    try:
        return [next(loader) for _ in range(count)], None
    except DataError as error:
        return [], error


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout's randomness as a function of (seed, step, rank), so that resuming needs no generator's state."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "little") >> 1)


def evaluate(state: TrainState) -> float:
    """The held-out loss now. All ranks call this."""
    assert state.eval_data is not None
    config = state.config
    return held_out_loss(
        state.engine, state.eval_data, config.eval.samples, config.train.micro_batch_size, config.data.num_workers,
        state.inputs,
    )  # fmt: skip


def save(state: TrainState) -> None:
    """A checkpoint of now. All ranks call this."""
    run = dataclasses.replace(state.run, step=state.step)
    keep_last = state.config.checkpoint.keep_last
    checkpoint.save(state.engine, state.output_dir, run, state.tokenizer, state.transform, keep_last)


def sample_keys(state: TrainState, step: int) -> list[str]:
    """Keys of the whole global batch of a step (counted from 0), in order, fillers left out."""
    slots = global_batch(state.order, step, state.geometry.global_batch_size)
    return [state.train_data.key(slot) for slot in slots if not slot.is_filler]
