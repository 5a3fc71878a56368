"""The configuration: one dataclass per section of the YAML, its defaults and what each key means.

    dataclass default -> YAML file -> --set section.key=value

`Config.load` reports every mistake at once: unknown keys with the nearest name, wrong types, missing files, numbers
that do not fit together.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer.config_checks import mistakes
from trainer.config_reader import build, read_yaml, set_override
from trainer.errors import ConfigError
from trainer.paths import find_config


@dataclass
class RunConfig:
    name: str = "run"
    """Shown in logs."""
    output_dir: str = ""
    """Folder of checkpoints, curves and the resolved configuration. Default: runs/NAME."""
    seed: int = 42
    """Of the initial weights of projector and adapters, and of the order of the samples."""
    overwrite: bool = False
    """With --resume none: remove the checkpoints that are in output_dir, and start anew there."""
    hang_seconds: int = 1800
    """A job in which a rank makes no progress for so long is ended, with the stacks of all ranks in output_dir."""


@dataclass
class ModelConfig:
    init_from: str | None = None
    """A Hugging Face export, checkpoint or run folder of an earlier stage; instead of the two below."""
    language_model: str | None = None
    """Folder of a Qwen (v1), or of a causal language model of Transformers with ChatML's control tokens, such as Qwen2,
    Qwen2.5 and Qwen3."""
    vision_tower: str | None = None
    """Folder of a CLIP or SigLIP model, whole or its vision part."""
    tokenizer: str | None = None
    """Folder with qwen.tiktoken or tokenizer.json. Default: the language model's folder."""
    vision_feature_layer: int | None = None
    """Hidden state of the tower that the projector reads: -1 the last, -2 the one before; what lies behind it does not
    train. Default: the earlier stage's, or -1."""
    image_aspect: Literal["crop", "pad", "squash"] | None = None
    """How pictures become square. Default: the earlier stage's, or crop, for SigLIP squash."""
    activation_checkpointing: bool | int | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, up to a third more time. true: in all layers; a number
    k: in every k-th; auto: in as few as the GPU's memory asks for, on a CPU in none."""
    fuse_elementwise: bool = False
    """Compute the norms, rotary embedding and gate of Qwen (v1) in one pass each, by torch.compile: faster, with other
    last bits. Takes a C++ compiler, and half a minute when training starts for the first time."""


@dataclass
class LoraConfig:
    r: int = 64
    """Rank of the adapters."""
    alpha: int = 16
    """An adapter's output is scaled by alpha / r."""
    dropout: float = 0.05
    """Share of an adapter's inputs that is left out in training."""
    target_modules: str = "c_attn|w1|w2"
    """Last names of the linear layers in the language model that get an adapter."""


@dataclass
class ShardsConfig:
    name: str
    """Of the source, in logs."""
    shards: str | list[str]
    """Tars: a path, a glob, a brace range ('data-{000..099}.tar'), or a list of these; also s3://, https://, hf://."""
    weight: float | None = None
    """Share of the rows that this source gives, relative to the others' weights; each source then has epochs of its
    own. Without weights an epoch has every sample of all sources once."""


@dataclass
class DataConfig:
    train: list[ShardsConfig] = field(default_factory=list)
    """Sources to train on; without weights, an epoch has every sample of all of them once."""
    eval: list[ShardsConfig] = field(default_factory=list)
    """Held-out sources."""
    max_length: int = 2048
    """Tokens of a sample, or of a pack, image features included; longer text is cut at its end."""
    packing: bool = False
    """Put whole conversations together into rows of `max_length` tokens, each seeing itself alone. Batch sizes then
    count packs."""
    num_workers: int = 4
    """Reading processes of each rank."""
    cache_dir: str | None = None
    """Folder, best on a local disk, for copies of remote shards. Default: ~/.cache/mqwen-trainer/shards."""
    cache_gib: float = 100.0
    """Size of these copies at most. As many shards must fit as are read at a time: 32, more with weighted sources, with
    packs of small shards, and for held-out data."""
    system_prompt: str = "You are a helpful assistant."
    """Opens conversations that have no system turn of their own; empty for none."""
    caption_prompt: str = "Describe the image."
    """Question to which a caption is the answer."""
    max_bad_fraction: float = 0.01
    """Share of bad samples (undecodable, without an answer, ...) above which the run stops; below it they are left out
    and named in bad_samples.jsonl."""


@dataclass
class OptimConfig:
    learning_rate: float = 2e-5
    """Peak rate of whatever trains outside the projector."""
    projector_learning_rate: float | None = None
    """Peak rate of the projector. Default: learning_rate."""
    weight_decay: float = 0.0
    """AdamW's, on matrices; norms and biases are never decayed."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's moment decays."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after warm-up; cosine and linear end at zero."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""


@dataclass
class TrainConfig:
    epochs: int | None = None
    """Passes over the data; or give max_steps (weighted sources need that)."""
    max_steps: int | None = None
    """Optimizer steps; or give epochs."""
    global_batch_size: int = 128
    """Samples (or packs) per optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: int = 1
    """Samples (or packs) per forward pass of one rank; in evaluation always samples."""
    micro_batch_tokens: int | None = None
    """Instead of micro_batch_size: put samples of like length together, up to so many tokens with their padding."""
    bf16: bool = True
    """Train in bfloat16 with fp32 master weights; false trains in fp32."""
    max_loss_ratio: float | None = None
    """Skip a step whose loss is more than so many times the median of the last 64; without it, none is skipped for
    its loss."""
    max_skipped_steps: int = 10
    """Steps in a row without an update, because a loss or gradient is not finite or the loss too high, after which the
    run stops."""


@dataclass
class CheckpointConfig:
    save_steps: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Checkpoints kept; 0 keeps all."""
    keep_every: int = 0
    """Keep those of every so many steps for good; 0: of none."""
    keep_best: bool = False
    """Keep the one with the lowest held-out loss (of those saved at a step that is evaluated); best.json names it."""


@dataclass
class EvalConfig:
    every_steps: int = 500
    """Steps between held-out losses; also after the last step. 0: never."""
    samples: int = 512
    """Held-out samples used, the first of the sources; 0 takes all."""
    answers: int = 0
    """Of the held-out samples, the first so many are answered at each evaluation: text and pictures in TensorBoard."""
    max_new_tokens: int = 64
    """Tokens of such an answer at most."""


@dataclass
class LoggingConfig:
    every_steps: int = 10
    """Steps between log lines and TensorBoard points; metrics.jsonl has every step."""
    sample_keys: bool = False
    """Write the keys of the whole global batch into metrics.jsonl."""


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    freeze: list[str] = field(default_factory=lambda: ["vision_tower"])
    """What does not train: a part (vision_tower, projector, language_model), a range of layers
    ('language_model.layers.0-11', both ends included), or a regular expression over parameter names."""
    lora: LoraConfig | None = None
    """Train adapters (LoRA, through PEFT) at optim.learning_rate, and none of the language model's own weights. Absent:
    off; `lora: {}` turns it on with these defaults."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    deepspeed: str = "ds_configs/zero2.json"
    """DeepSpeed's JSON: ZeRO and communication. Batch, precision, clipping and rates are this file's: "auto" there."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @classmethod
    def load(
        cls, path: str | Path, overrides: list[str] | None = None, world_size: int = 1, needs_data: bool = True
    ) -> "Config":
        """The configuration of a YAML file (or the name of one in launch/configs/), with `a.b=value` overrides.

        needs_data: false where shards may be missing.

        Raises ConfigError listing every unknown key, wrong type and missing file, every model folder of another
        architecture, and every number that does not fit (with so many ranks).
        """
        file = find_config(path)
        tree = read_yaml(file) or {}
        if not isinstance(tree, dict):
            raise ConfigError(f"{file}: expected sections, found a {type(tree).__name__}")
        errors: list[str] = []
        for override in overrides or []:
            set_override(tree, override, errors)
        config = build(cls, tree, "", errors)
        if not config.run.output_dir:
            config.run.output_dir = f"runs/{config.run.name}"
        # Of a key that is wrong already, what its default lacks is no second mistake.
        named = {error.partition(": ")[0] for error in errors}
        errors += [error for error in mistakes(config, world_size, needs_data) if error.partition(": ")[0] not in named]
        if errors:
            where = f"{file} with overrides" if overrides else f"{file}"
            raise ConfigError(f"{where}: {len(errors)} mistake{'s' * (len(errors) > 1)}\n  - " + "\n  - ".join(errors))
        return config

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def write(self, file: Path) -> list[str]:
        """Writes the resolved configuration; what differs from the one that was there, as `key: before -> now`."""
        try:
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):  # none, or one that a kill has cut short
            before = None
        now, partial = self.to_dict(), file.with_suffix(".partial")
        partial.write_text(yaml.safe_dump(now, sort_keys=False, allow_unicode=True), encoding="utf-8")
        partial.replace(file)
        return differences(before, now) if isinstance(before, dict) else []


def differences(before: dict, now: dict, where: str = "") -> list[str]:
    """Keys of two trees whose values differ; a key that only one of them has is none."""
    found = []
    for key in before.keys() & now.keys():
        if isinstance(before[key], dict) and isinstance(now[key], dict):
            found += differences(before[key], now[key], f"{where}{key}.")
        elif before[key] != now[key]:
            found.append(f"{where}{key}: {before[key]} -> {now[key]}")
    return sorted(found)
