"""The configuration: one dataclass per section of the YAML, its defaults and what each key means.

    dataclass default -> YAML file -> --set section.key=value

`Config.load` reports every mistake at once: unknown keys with the nearest name, wrong types, missing files, numbers
that do not fit together.
"""

import dataclasses
import glob
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer import deepspeed_json
from trainer.config_reader import build, set_override
from trainer.errors import ConfigError
from trainer.urls import check_scheme, scheme_of

ROOT = Path(__file__).resolve().parents[1]
"""The repository: `ds_configs/` and `launch/configs/` lie here."""


@dataclass
class RunConfig:
    name: str = "run"
    """Shown in logs."""
    output_dir: str = ""
    """Folder of checkpoints, curves and the resolved configuration. Default: runs/NAME."""
    seed: int = 42
    """Of the projector's initial weights and the order of the samples."""
    overwrite: bool = False
    """With --resume none: remove the checkpoints that are in output_dir, and start anew there."""
    hang_seconds: int = 1800
    """A job in which a rank makes no progress for so long is ended, with the stacks of all ranks in output_dir."""


@dataclass
class ModelConfig:
    init_from: str | None = None
    """A Hugging Face export, checkpoint or run folder of an earlier stage; instead of the two below."""
    language_model: str | None = None
    """Folder of a Qwen (v1) model."""
    vision_tower: str | None = None
    """Folder of a CLIP model."""
    tokenizer: str | None = None
    """Folder with qwen.tiktoken or tokenizer.json. Default: the language model's folder."""
    vision_feature_layer: int | None = None
    """Hidden state of the tower that the projector reads: -1 the last, -2 the one before. Default: the earlier stage's,
    or -1."""
    image_aspect: Literal["crop", "pad", "squash"] | None = None
    """How pictures become square. Default: the earlier stage's, or crop."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


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
        try:
            tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: not YAML: {error}") from error
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
        errors += [error for error in config.validate(world_size, needs_data) if error.partition(": ")[0] not in named]
        if errors:
            raise ConfigError(f"{file}: {len(errors)} mistake{'s' * (len(errors) > 1)}\n  - " + "\n  - ".join(errors))
        return config

    def validate(self, world_size: int, needs_data: bool = True) -> list[str]:
        """What is wrong, one line each, without reading weights or data."""
        return [
            *_check_model(self.model), *_check_data(self, needs_data), *_check_mixture(self), *_check_numbers(self),
            *_check_batch(self.train, world_size),
            *_check_files(self, world_size),
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def find_config(path: str | Path) -> Path:
    """A path, or the name of a file in launch/configs/ with or without its ending."""
    named = ROOT / "launch" / "configs" / path
    for file in (Path(path), named, named.with_name(named.name + ".yaml")):
        if file.is_file():
            return file
    known = ", ".join(sorted(file.stem for file in named.parent.glob("*.yaml")))
    raise ConfigError(f"--config {path}: no such file, and no such name in launch/configs/ (there are: {known})")


def find_deepspeed(path: str) -> Path:
    """DeepSpeed's JSON, from the working folder or from the repository."""
    return Path(path) if Path(path).is_file() else ROOT / path


def expand_shards(patterns: str | list[str]) -> list[Path | str]:
    """Paths, globs and brace ranges -> tars, each pattern's sorted by name. Empty where a pattern finds nothing.

    URLs stay text, and their globs stay globs: those their server has to answer."""
    tars: list[Path | str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for one in _expand_braces(pattern):
            if scheme_of(one):
                tars.append(one)
            else:
                tars += map(Path, sorted(glob.glob(one)) if glob.has_magic(one) else [one])
    return tars


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [whole for n in numbers for whole in _expand_braces(pattern[: match.start()] + n + pattern[match.end() :])]


def _check_model(model: ModelConfig) -> list[str]:
    errors = []
    parts = {"language_model": model.language_model, "vision_tower": model.vision_tower}
    if model.init_from:
        if any(parts.values()):
            errors.append("model: give either init_from or language_model and vision_tower, not both")
    else:
        errors += [f"model.{name}: missing; or give model.init_from" for name, folder in parts.items() if not folder]
    folders = {**parts, "init_from": model.init_from, "tokenizer": model.tokenizer}
    for name, folder in folders.items():
        if folder and not Path(folder).is_dir():
            errors.append(f"model.{name}: no such folder: {folder}")
        elif folder and name in MODEL_TYPES:
            errors += _check_model_type(f"model.{name}", Path(folder), MODEL_TYPES[name])
    return errors


MODEL_TYPES = {"language_model": ("qwen",), "vision_tower": ("clip", "clip_vision_model")}
"""`model_type` of the folders' config.json that each key takes."""


def _check_model_type(where: str, folder: Path, expected: tuple[str, ...]) -> list[str]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        return [f"{where}: {folder} has no readable config.json ({error})"]
    if found in expected:
        return []
    return [f"{where}: {folder} is of architecture '{found}', expected {' or '.join(map(repr, expected))}"]


def _check_data(config: Config, needs_data: bool) -> list[str]:
    errors = [] if config.data.train else ["data.train: no source to train on"]
    for split in ("train", "eval"):
        for number, source in enumerate(getattr(config.data, split)):
            where = f"data.{split}[{number}].shards"
            if not source.shards:
                errors.append(f"{where}: names no tar")
                continue
            for pattern in [source.shards] if isinstance(source.shards, str) else source.shards:
                if scheme_of(pattern):
                    errors += _check_url(where, pattern)
                if scheme_of(pattern) or not needs_data:
                    continue
                tars = expand_shards(pattern)
                missing = [str(tar) for tar in tars if not Path(tar).is_file()]
                if not tars:
                    errors.append(f"{where}: '{pattern}' matches no file")
                elif missing:
                    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
                    errors.append(f"{where}: no such file: {missing[0]}{more}")
    return errors


def _check_url(where: str, pattern: str) -> list[str]:
    """What is wrong with a URL, without asking its server."""
    try:
        for one in _expand_braces(pattern):
            check_scheme(one)
    except ConfigError as error:
        return [f"{where}: {error}"]
    return []


def _check_mixture(config: Config) -> list[str]:
    """Whether weights, packing and the token budget fit together."""
    data, train, errors = config.data, config.train, []
    weights = [source.weight for source in data.train]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        errors.append("data.train: give every source a weight, or none")
    for number, weight in enumerate(weights):
        if weight is not None and weight <= 0:
            errors.append(f"data.train[{number}].weight: must be above 0, found {weight}; leave the source out instead")
    if any(weights) and train.epochs is not None:
        errors.append("train.epochs: weighted sources have epochs of their own; give train.max_steps instead")
    names = [source.name for source in data.train]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        errors.append(f"data.train: several sources are named {', '.join(twice)}; each needs a name of its own")
    for number, source in enumerate(data.eval):
        if source.weight is not None:
            errors.append(f"data.eval[{number}].weight: held-out sources have no weights; all their samples count")
    if data.cache_gib <= 0:
        errors.append(f"data.cache_gib: must be above 0, found {data.cache_gib}")
    if not 0 <= data.max_bad_fraction <= 1:
        errors.append(f"data.max_bad_fraction: must be between 0 and 1, found {data.max_bad_fraction}")
    if train.micro_batch_tokens is not None and data.packing:
        errors.append("train.micro_batch_tokens: packs are of like length already; set train.micro_batch_size instead")
    elif train.micro_batch_tokens is not None and train.micro_batch_tokens < data.max_length:
        errors.append(
            f"train.micro_batch_tokens={train.micro_batch_tokens} is less than data.max_length={data.max_length}: the "
            f"longest sample would not fit"
        )
    return errors


def _check_numbers(config: Config) -> list[str]:
    errors = []
    train, optim = config.train, config.optim
    if (train.epochs is None) == (train.max_steps is None):
        errors.append("train.max_steps: give either this or train.epochs, and null for the other")
    positive = {
        "train.epochs": train.epochs, "train.max_steps": train.max_steps, "data.max_length": config.data.max_length,
        "train.global_batch_size": train.global_batch_size, "train.micro_batch_size": train.micro_batch_size,
        "run.hang_seconds": config.run.hang_seconds,
        "train.max_skipped_steps": train.max_skipped_steps, "checkpoint.save_steps": config.checkpoint.save_steps,
        "logging.every_steps": config.logging.every_steps, "eval.max_new_tokens": config.eval.max_new_tokens,
    }  # fmt: skip
    errors += [f"{name}: must be at least 1, found {n}" for name, n in positive.items() if n is not None and n < 1]
    not_negative = {
        "data.num_workers": config.data.num_workers, "checkpoint.keep_last": config.checkpoint.keep_last,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "eval.every_steps": config.eval.every_steps, "eval.samples": config.eval.samples,
        "eval.answers": config.eval.answers,
        "optim.learning_rate": optim.learning_rate, "optim.weight_decay": optim.weight_decay,
        "optim.max_grad_norm": optim.max_grad_norm, "optim.projector_learning_rate": optim.projector_learning_rate,
    }  # fmt: skip
    errors += [
        f"{name}: must not be negative, found {n}" for name, n in not_negative.items() if n is not None and n < 0
    ]
    if train.max_loss_ratio is not None and train.max_loss_ratio <= 1:
        errors.append(f"train.max_loss_ratio: must be above 1, found {train.max_loss_ratio}; null for none")
    if not 0 <= optim.warmup_ratio <= 1:
        errors.append(f"optim.warmup_ratio: must be between 0 and 1, found {optim.warmup_ratio}")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        errors.append(f"optim.betas: expected two numbers from 0 to below 1, found {optim.betas}")
    return errors


def _check_files(config: Config, world_size: int) -> list[str]:
    errors = []
    file = find_deepspeed(config.deepspeed)
    if file.is_file():
        errors += deepspeed_json.build(file, config, world_size)[1]
    else:
        errors.append(f"deepspeed: no such file: {config.deepspeed}")
    if Path(config.run.output_dir).exists() and not Path(config.run.output_dir).is_dir():
        errors.append(f"run.output_dir: {config.run.output_dir} is a file, expected a folder")
    return errors


def _check_batch(train: TrainConfig, world_size: int) -> list[str]:
    """Whether the global batch can be cut into whole micro-batches on so many ranks."""
    unit = train.micro_batch_size * world_size
    if train.micro_batch_tokens is not None or unit < 1 or train.global_batch_size % unit == 0:
        return []
    lower = train.global_batch_size // unit * unit
    nearest = ", ".join(str(n) for n in (lower, lower + unit) if n)
    return [
        f"train.global_batch_size={train.global_batch_size} is not a multiple of micro_batch_size x world size "
        f"({train.micro_batch_size} x {world_size}); nearest valid values: {nearest}"
    ]
