"""One arm of a speed comparison, as a process that trains the steps it is asked for.

    python benchmarks/arms.py ARM CONFIG

For every line on its standard input, a number of steps, it trains so many, and prints a line of JSON with the seconds
they took, the peak of memory so far, and each step's loss and gradient norm. So the arms of a comparison are run by
turns, and rest between; before the first line nothing but the program is loaded. All train on the same samples in the
same steps: those of the configuration's stream.

    notes     the public notes' way: HF Trainer on one GPU; rows padded with the end token, which is attended to;
              explicit causal mask, all logits, reentrant checkpointing, CLIP's processor in the main process
    hf        HF Trainer tuned: DeepSpeed ZeRO-2, Transformers' own LLaVA with Qwen2 (the same mathematics), samples of
              like length together, causal SDPA, workers, activation checkpointing
    hf-kept   the same without activation checkpointing
    pytorch   a plain PyTorch loop around this project's model and loader, without DeepSpeed
    ours      this project's training loop
"""

import argparse
import gc
import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from llava import as_llava
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainer.config import Config
from trainer.data.loader import BatchLoader, fetch
from trainer.data.order import Row, global_batch, micro_batches
from trainer.data.samples import IGNORE_INDEX
from trainer.dist import distributed, world_from_environment
from trainer.evaluate import count_supervised
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.optim import build_optimizer, parameter_groups
from trainer.setup import TrainState, setup
from trainer.train import train_step

TAKEN = ("loss", "grad_norm", "data_time", "tokens", "supervised_tokens", "images", "tflops", "mfu", "hfu")
"""Of a line of metrics.jsonl, for the driver."""


class Clock:
    """Answers the driver: waits for a round, lets steps be noted, and prints what the round took."""

    def __init__(self) -> None:
        """Waits until the first round is asked for."""
        self.asked = sys.stdin.readline()

    def wait(self) -> bool:
        """Waits for the next round; whether there is one."""
        line, self.asked = self.asked or sys.stdin.readline(), ""
        self.left = int(line.strip() or 0)
        self.steps: list[dict[str, float | None]] = []
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()
        return self.left > 0

    def step(self, loss: float, grad_norm: float, **more: float | None) -> bool:
        """Notes a step; at a round's end answers and waits for the next. Whether training goes on."""
        self.steps.append({"loss": float(loss), "grad_norm": float(grad_norm), **more})
        if len(self.steps) < self.left:
            return True
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        print(
            json.dumps({"seconds": time.perf_counter() - self.started, "steps": self.steps, "peak": peak}), flush=True
        )
        return self.wait()


def prepare(config: Config, packed: bool) -> TrainState:
    """Data, model and engine. packed: how batches are made; rows and steps are the same either way."""
    state = setup(config, world_from_environment(), "none", saves=False)
    state.train_data.packed = packed
    return state


def prepare_peer(config: Config, packed: bool) -> tuple[TrainState, MQWenForConditionalGeneration]:
    """The same for an arm that trains by itself: the model, and the state without the engine and its copies of the
    weights."""
    state = prepare(config, packed)
    model = state.engine.module
    state.engine.destroy()
    for hooks in (model._forward_hooks, model._forward_pre_hooks):
        hooks.clear()
    state.engine = SimpleNamespace(device=state.engine.device, module=model)  # what making inputs asks for
    del state.saver, state.meter
    gc.collect()
    return state, model


def ours(config: Config, clock: Clock) -> None:
    """This project's own step, over its own loader."""
    state = prepare(config, packed=True)
    state.engine.train()
    steps = micro_batches(state.stream, state.geometry, 0, state.last_step)
    with closing(BatchLoader(state.train_data, steps, config.data.num_workers, torch.cuda.is_available())) as loader:
        going = clock.wait()
        while going:
            line = train_step(state, loader)
            going = clock.step(**{key: line[key] for key in TAKEN})
    state.engine.destroy()


def pytorch(config: Config, clock: Clock) -> None:
    """Weights are in the type that DeepSpeed has them in; in bf16 AdamW updates fp32 copies, as under ZeRO."""
    state, model = prepare_peer(config, packed=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = trained if trained[0].dtype == torch.float32 else [p.detach().float() for p in trained]
    sums = [torch.zeros_like(master) for master in masters]
    groups = parameter_groups(model, config.optim)
    master_of = dict(zip(trained, masters, strict=True))
    optimizer = build_optimizer([{**g, "params": [master_of[p] for p in g["params"]]} for g in groups], config.optim)
    model.train()
    steps = micro_batches(state.stream, state.geometry, 0, state.last_step)
    with closing(BatchLoader(state.train_data, steps, config.data.num_workers, torch.cuda.is_available())) as loader:
        going = clock.wait()
        while going:
            started = time.perf_counter()
            micro, _ = fetch(loader)
            waited = time.perf_counter() - started
            supervised, losses = sum(map(count_supervised, micro)), []
            for total in sums:
                total.zero_()
            for batch in micro:
                output = model(**state.inputs(batch), loss_only=True, use_cache=False, num_items_in_batch=supervised)
                output.loss.backward()
                losses.append(output.loss.detach())
                for total, parameter in zip(sums, trained, strict=True):
                    total += parameter.grad
                    parameter.grad = None
            for master, total in zip(masters, sums, strict=True):
                master.grad = total
            norm = torch.nn.utils.clip_grad_norm_(masters, config.optim.max_grad_norm)
            optimizer.step()
            for parameter, master in zip(trained, masters, strict=True):
                if master is not parameter:
                    parameter.data.copy_(master)
                master.grad = None
            going = clock.step(torch.stack(losses).sum().item(), norm.item(), data_time=waited)


class Samples(Dataset):
    """Samples as a LLaVA-style dataset gives them: text encoded, picture through CLIP's processor."""

    def __init__(self, state: TrainState, processor: CLIPImageProcessorPil):
        self.data, self.processor = state.train_data, processor

    def __getitem__(self, slot: Any) -> dict[str, Any]:
        input_ids, labels = self.data.template.encode(self.data.reader.conversation(slot))
        input_ids, labels = self.data.template.truncate(input_ids, labels, self.data.max_length)
        images = [Image.open(io.BytesIO(encoded)) for encoded in self.data.reader.images(slot)]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"] if images else None
        return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels), "pixel_values": pixels}


class Collator:
    """Pads on the right; `mask` says which tokens are real, or is left out, so that padding is attended to."""

    def __init__(self, pad: int, mask: bool):
        self.pad, self.mask = pad, mask

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        ids = [sample["input_ids"] for sample in samples]
        pictures = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
        batch = {"input_ids": padded(ids, self.pad), "labels": padded([s["labels"] for s in samples], IGNORE_INDEX)}
        batch["labels"][:, 0] = IGNORE_INDEX
        if self.mask:
            batch["attention_mask"] = padded([torch.ones_like(row) for row in ids], 0)
        if pictures:
            batch["pixel_values"] = torch.cat(pictures)
        return batch


class Batches:
    """The micro-batches of all steps, cut from the same samples as ours: as many as ours, of equally many samples."""

    def __init__(self, state: TrainState, parts: int, by_length: bool):
        self.state, self.parts, self.by_length = state, parts, by_length

    def __len__(self) -> int:
        return self.state.last_step * self.parts

    def __iter__(self) -> Iterator[Row]:
        for step in range(self.state.last_step):
            rows = global_batch(self.state.stream, step, self.state.geometry.global_batch_size)
            slots = [slot for row in rows for slot in row]
            if self.by_length:
                slots.sort(key=self.state.row_length, reverse=True)
            for part in range(self.parts):
                yield slots[part * len(slots) // self.parts : (part + 1) * len(slots) // self.parts]


class Driven(TrainerCallback):
    """Trains as many steps as the driver asks for, and notes each."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_begin(self, args, state, control, **_):
        self.clock.wait()

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "grad_norm" in logs and not self.clock.step(logs["loss"], logs["grad_norm"]):
            control.should_training_stop = True


def hf_trainer(config: Config, clock: Clock, arguments: dict[str, Any], mask: bool, workers: int, model_of) -> None:
    """HF Trainer over the configuration's steps. model_of: (this project's model) -> the one it trains."""
    state, model = prepare_peer(config, packed=False)
    processor = CLIPImageProcessorPil.from_pretrained(config.model.vision_tower)
    pad = state.tokenizer.pad_token_id
    batches = Batches(state, config.train.global_batch_size // config.train.micro_batch_size, by_length=mask)

    class OverTheSameSteps(Trainer):
        def get_train_dataloader(self):
            return DataLoader(
                Samples(state, processor), batch_sampler=batches, collate_fn=Collator(pad, mask), num_workers=workers,
                pin_memory=torch.cuda.is_available(),
            )  # fmt: skip

        def create_optimizer(self, model=None):
            self.optimizer = build_optimizer(groups, optim)
            return self.optimizer

    optim = config.optim
    common = {
        "output_dir": config.run.output_dir, "max_steps": state.last_step, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "gradient_accumulation_steps": batches.parts, "seed": 0,
        "lr_scheduler_type": "constant", "max_grad_norm": optim.max_grad_norm, "bf16": config.train.bf16,
        "use_cpu": not torch.cuda.is_available(), "remove_unused_columns": False,
    }  # fmt: skip
    model = state.engine.module = model_of(model)
    gc.collect()
    groups = (
        parameter_groups(model, optim) if isinstance(model, MQWenForConditionalGeneration) else groups_of(model, optim)
    )
    settings = TrainingArguments(**common, **arguments)
    trainer = OverTheSameSteps(
        model=model, args=settings, train_dataset=Samples(state, processor), callbacks=[Driven(clock)]
    )
    trainer.train()


def groups_of(model: torch.nn.Module, optim) -> list[dict[str, Any]]:
    """AdamW's groups for Transformers' LLaVA: the projector has its own rate."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["multi_modal_projector" in name].append(parameter)
    rates = {True: optim.projector_learning_rate, False: optim.learning_rate}
    return [{"params": found, "lr": rates[of]} for of, found in groups.items() if found]


def notes(config: Config, clock: Clock) -> None:
    """The notes' way, as told above."""

    config = replace(config, model=replace(config.model, fuse_elementwise=False))

    def explicit(model: MQWenForConditionalGeneration) -> MQWenForConditionalGeneration:
        model.set_attn_implementation("eager")
        return model

    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    hf_trainer(config, clock, arguments, mask=False, workers=0, model_of=explicit)


def hf(config: Config, clock: Clock, checkpointing: bool = True) -> None:
    """A tuned HF Trainer, with or without activation checkpointing."""
    zero = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9, "zero_optimization": {"stage": 2},
    }  # fmt: skip
    arguments = {"gradient_checkpointing": checkpointing, "deepspeed": zero}
    if checkpointing:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    hf_trainer(config, clock, arguments, mask=True, workers=config.data.num_workers, model_of=as_llava)


ARMS: dict[str, Callable[[Config, Clock], None]] = {
    "notes": notes, "hf": hf, "hf-kept": lambda config, clock: hf(config, clock, checkpointing=False),
    "pytorch": pytorch, "ours": ours,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("config", type=Path)
    args = parser.parse_args()
    clock = Clock()
    if not clock.asked:
        return
    world = world_from_environment()
    config = Config.load(args.config, world_size=world.world_size)
    with distributed(world):
        ARMS[args.arm](config, clock)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
