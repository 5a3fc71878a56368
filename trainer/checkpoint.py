"""Checkpoints: whole or not there.

    output_dir/checkpoint-000500/{deepspeed/, hf/, state.json, manifest.json}     output_dir/latest

Everything is written into a folder with another name; only when all ranks are done does it get its own, and only then
does `latest` point to it. `deepspeed/` continues this run; `hf/` opens in Transformers and starts another stage.
Frozen weights are in `hf/` alone, and a resumed run takes them from there.
"""

import json
import os
import pickle
import re
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from transformers import PreTrainedTokenizerBase

from trainer.data.transform import ImageTransform
from trainer.dist import barrier, log
from trainer.engine import full_state_dict
from trainer.errors import CheckpointError
from trainer.load import EXPORT, LATEST
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration

FORMAT = 2
DEEPSPEED = "deepspeed"
"""Tag, and so folder, of DeepSpeed's own files."""

SAFE_GLOBALS = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed's files may hold beside tensors and plain values; anything else is not loaded."""


@dataclass(frozen=True)
class RunState:
    """What a run needs to go on, beside weights and optimizer: where it is, and in which stream of samples."""

    step: int
    seed: int
    global_batch_size: int
    order: str
    """How samples become rows: plain, packed, mixed."""
    shards: list[str]
    """Name and hash of each training shard."""
    world_size: int
    zero_stage: int
    """Ranks and ZeRO stage that DeepSpeed's files are cut for."""
    bad_samples: dict[str, int] = field(default_factory=dict)
    """Samples left out so far, by kind."""
    format: int = FORMAT


def name_of(step: int) -> str:
    return f"checkpoint-{step:06d}"


def existing(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, by step."""
    names = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*"))
    found = {int(name[1]): output_dir / name[0] for name in names if name}
    return [found[step] for step in sorted(found)]


def save(
    engine: deepspeed.DeepSpeedEngine,
    output_dir: Path,
    state: RunState,
    tokenizer: PreTrainedTokenizerBase,
    transform: ImageTransform,
    keep_last: int,
) -> Path:
    """Writes one checkpoint, then moves `latest` to it and removes the oldest. All ranks call this."""
    final = output_dir / name_of(state.step)
    partial, replaced = output_dir / f".{final.name}.partial", output_dir / f".{final.name}.replaced"
    is_main = engine.global_rank == 0
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)  # left by a save that was killed
        partial.mkdir(parents=True)
    barrier()
    engine.save_checkpoint(str(partial), tag=DEEPSPEED, save_latest=False, exclude_frozen_parameters=True)
    weights = full_state_dict(engine)
    if is_main:
        export(engine.module, weights, partial / EXPORT, tokenizer, transform)
        _write_json(partial / "state.json", asdict(state))
    barrier()
    if is_main:
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        _write_json(partial / "manifest.json", {str(f.relative_to(partial)): f.stat().st_size for f in files})
        for file in [*files, partial / "manifest.json"]:
            _sync(file)
        for folder in (partial / DEEPSPEED, partial / EXPORT, partial):
            _sync(folder)
        if final.exists():  # saved before, by a run that went on from an older one
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        _sync(output_dir)
        shutil.rmtree(replaced, ignore_errors=True)
        pointer = output_dir / f".{LATEST}.partial"
        pointer.write_text(final.name + "\n")
        _sync(pointer)
        pointer.replace(output_dir / LATEST)
        _sync(output_dir)
        # After a resume from an older checkpoint the newest is not the one with the highest step.
        others = [path for path in existing(output_dir) if path != final]
        for old in others[: max(0, len(others) + 1 - keep_last)] if keep_last else []:
            shutil.rmtree(old)
    barrier()
    log.info("saved %s", final)
    return final


def find_resume(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume auto|none|PATH` means, or None to start anew.

    Raises CheckpointError for a path that is no whole checkpoint, and for `none` where there are checkpoints to lose.
    """
    if resume == "none":
        if existing(output_dir):
            raise CheckpointError(
                f"{output_dir} holds checkpoints, which a new run would replace; resume (--resume auto), choose "
                f"another run.output_dir, or remove the folder"
            )
        return None
    if resume == "auto":
        if not (output_dir / LATEST).is_file():
            return None
        name = (output_dir / LATEST).read_text().strip()
        if not name:
            raise CheckpointError(f"{output_dir / LATEST} is empty; name a checkpoint with --resume PATH")
        path = output_dir / name
    else:
        path = Path(resume)
        if not path.is_dir():
            raise CheckpointError(f"{path}: not a whole checkpoint: no such folder")
    _check_whole(path)
    return path


def _check_whole(path: Path) -> None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if not manifest or not isinstance(manifest, dict):
            raise ValueError("it lists no file")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint: its manifest.json cannot be read ({error})") from error
    for name, size in manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise CheckpointError(f"{path}: not whole: {name} should have {size} bytes, found {found}")


def read_state(path: Path, expected: RunState) -> RunState:
    """The state in a checkpoint. Raises CheckpointError if it is of another stream of samples or another geometry."""
    try:
        stored = json.loads((path / "state.json").read_text())
        if stored["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: of format {stored['format']}, and this version reads {FORMAT}; go on with the version that "
                f"wrote it, or take the weights alone, with model.init_from={path}"
            )
        state = RunState(**stored)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: its state.json cannot be read ({error})") from error
    names = {"seed": "run.seed", "global_batch_size": "train.global_batch_size",
             "order": "order of the samples", "world_size": "number of ranks", "zero_stage": "ZeRO stage"}  # fmt: skip
    differing = [
        f"{text} was {getattr(state, name)}, is {getattr(expected, name)}"
        for name, text in names.items() if getattr(state, name) != getattr(expected, name)
    ]  # fmt: skip
    differing += _differing_shards(state.shards, expected.shards)
    if differing:
        raise CheckpointError(
            f"{path}: another run than this one: {'; '.join(differing)}. Set them back, or start in a new run folder, "
            f"with model.init_from={path} to keep the weights."
        )
    return state


def _differing_shards(before: list[str], now: list[str]) -> list[str]:
    """What has become of the training shards since a checkpoint, in words; each is named by "name hash"."""
    if before == now:
        return []
    # Sources may have shards of one name: what is left of both lists once equals are taken away is told by its names.
    old, new = Counter(before) - Counter(now), Counter(now) - Counter(before)
    gone, come = (Counter(shard.rpartition(" ")[0] for shard in left.elements()) for left in (old, new))
    changed = [f"shard {name} has changed" for name in (gone & come).elements()]
    changed += [f"shard {name} is missing" for name in (gone - come).elements()]
    changed += [f"shard {name} is new" for name in (come - gone).elements()]
    more = [f"and {len(changed) - 3} more shards differ"] if len(changed) > 3 else []
    return changed[:3] + more or ["the training shards come in another order"]


def load(engine: deepspeed.DeepSpeedEngine, path: Path) -> None:
    """Weights and optimizer of a checkpoint into the engine; frozen weights stay as they are. Loads no code.

    Rates, betas and decay stay those of this run's configuration: only what the optimizer has gathered is loaded.
    Raises CheckpointError where DeepSpeed's files hold anything but tensors, plain values and `SAFE_GLOBALS`.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed itself asks for unpickling of anything
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            loaded, _ = engine.load_checkpoint(str(path), tag=DEEPSPEED, load_module_strict=False)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path}: nothing was loaded: a file in {DEEPSPEED}/ holds {found[1] if found else 'what is no pickle'}, "
            f"expected tensors and plain values; take the weights alone, with model.init_from={path}"
        ) from error
    finally:
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed found nothing to load in {path / DEEPSPEED}")
    for group, setting in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(setting)


def export(
    model: MQWenForConditionalGeneration,
    weights: dict[str, torch.Tensor],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    transform: ImageTransform,
) -> None:
    """Writes a folder that opens in Transformers without this package: the modeling files travel with the weights."""
    model.config.auto_map = {
        "AutoConfig": "configuration_mqwen_vl.MQWenVLConfig",
        "AutoModelForCausalLM": "modeling_mqwen_vl.MQWenForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_mqwen_vl.MQWenForConditionalGeneration",
    }
    for part in (model.config.text_config, model.config.vision_config):
        part.__dict__.pop("auto_map", None)  # of the folder it came from
    model.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    if transform.aspect != "pad":  # for which Transformers has no image processor: config.json says image_aspect
        transform.to_processor().save_pretrained(folder)
    for file in (Path(__file__).parent / "models").glob("*.py"):
        if file.name != "__init__.py":
            shutil.copy(file, folder)
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)  # safetensors makes files that the owner alone can read


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
