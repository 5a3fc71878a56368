"""Checkpoints: whole or not there. How they are found and loaded; saving.py writes them.

    output_dir/checkpoint-000500/{deepspeed/, hf/, state.json, manifest.json}     output_dir/latest

`deepspeed/` continues this run; `hf/` opens in Transformers and starts another stage. Frozen weights are in `hf/`
alone, and a resumed run takes them from there; on the disk they are once a run, under a name in each checkpoint. With
LoRA hf/ is the adapter, and base/ the rest of the model, whole.
"""

import json
import os
import pickle
import re
import shutil
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from trainer.convert import convert
from trainer.dist import log
from trainer.errors import CheckpointError, refused_name
from trainer.folders import LATEST
from trainer.manifest import check_whole

FORMAT = 3
DEEPSPEED = "deepspeed"
"""Tag, and so folder, of DeepSpeed's own files."""

STATE = "state.json"

BEST = "best.json"
"""File in a run folder that names its checkpoint with the lowest held-out loss."""

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
    trained: str
    """How many parameters train, and a hash of their names and shapes."""
    shards: list[str]
    """Name and hash of each training shard."""
    shard_times: list[int]
    """When each was last written to, in ns: a hash is of headers, and contents can change behind those."""
    world_size: int
    zero_stage: int
    """Ranks and ZeRO stage that DeepSpeed's files are cut for."""
    sub_group_size: int | None = None
    """Of ZeRO-3, for which they are cut too; None in checkpoints of before it was told."""
    bad_samples: dict[str, int] = field(default_factory=dict)
    """Samples left out so far, by kind."""
    frozen: str = ""
    """Fingerprint of the frozen weights."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps, for `train.max_loss_ratio`."""
    evaluation_due: bool = False
    """Whether the run stopped before this step's held-out loss was known."""
    format: int = FORMAT


def name_of(step: int) -> str:
    return f"checkpoint-{step:06d}"


def existing(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, by step."""
    names = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*"))
    found = {int(name[1]): output_dir / name[0] for name in names if name}
    return [found[step] for step in sorted(found)]


def read_best(output_dir: Path) -> dict[str, Any]:
    try:
        best = json.loads((output_dir / BEST).read_text())
    except (OSError, ValueError):
        return {}
    return best if isinstance(best, dict) else {}


def find_resume(output_dir: Path, resume: str, overwrite: bool = False) -> Path | None:
    """The checkpoint that `--resume auto|none|PATH` means, or None to start anew.

    `auto` takes the one that `latest` names, or, if that is not whole, the one of the highest step that is, and says
    why it passed over others. Raises CheckpointError for a path that is no whole checkpoint, for `auto` where there are
    checkpoints and none is whole, and for `none` where there are checkpoints to lose, unless `overwrite` says to.
    """
    if resume == "none":
        if existing(output_dir) and not overwrite:
            raise CheckpointError(
                f"{output_dir} holds checkpoints, which a new run would replace; resume (--resume auto), choose "
                f"another run.output_dir, or set run.overwrite"
            )
        return None
    if resume != "auto":
        if not Path(resume).is_dir():
            raise CheckpointError(f"{resume}: no such folder; name a checkpoint, or let --resume auto choose")
        try:
            check_whole(Path(resume))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; name another checkpoint, or let --resume auto choose") from error
        return Path(resume)
    candidates = existing(output_dir)[::-1]
    pointed_to = (output_dir / LATEST).read_text().strip() if (output_dir / LATEST).is_file() else ""
    candidates.sort(key=lambda path: path.name != pointed_to)  # that one first, the others as they are
    if candidates and pointed_to not in {path.name for path in candidates}:
        log.warning("%s names %s, which is not there", output_dir / LATEST, pointed_to or "nothing")
    for path in candidates:
        try:
            check_whole(path)
            return path
        except CheckpointError as error:
            log.warning("passed over %s", error)
    if candidates:
        raise CheckpointError(
            f"{output_dir}: none of its {len(candidates)} checkpoints is whole; a new run needs another "
            f"run.output_dir, or --resume none with run.overwrite"
        )
    if pointed_to:
        raise CheckpointError(
            f"{output_dir / LATEST} names {pointed_to}, and no checkpoint is there: put it back, choose another "
            f"run.output_dir, or start anew (--resume none)"
        )
    return None


def tidy(output_dir: Path) -> None:
    """Removes what saves that were killed have left, but gives a checkpoint its name back that was being replaced."""
    for replaced in output_dir.glob(".checkpoint-*.replaced"):
        final = replaced.with_name(replaced.name[1:].removesuffix(".replaced"))
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    for partial in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(partial)
    sweep(output_dir)


def sweep(output_dir: Path) -> None:
    """Removes what is left of checkpoints that were being removed, as far as the disk allows: somebody may read it."""
    for left in output_dir.glob(".checkpoint-*.removed"):
        shutil.rmtree(left, ignore_errors=True)


def clear(output_dir: Path) -> None:
    """Removes the checkpoints of a run, for one that starts anew in its folder."""
    for name in (LATEST, BEST):
        (output_dir / name).unlink(missing_ok=True)
    for path in existing(output_dir):
        shutil.rmtree(path)


def read_state(path: Path, expected: RunState) -> RunState:
    """The state in a checkpoint, with the geometry of now: `load` sees to a change of that.

    Raises CheckpointError if it is of another stream of samples.
    """
    try:
        stored = json.loads((path / STATE).read_text())
        if stored["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: of format {stored['format']}, and this version reads {FORMAT}; go on with the version that "
                f"wrote it, or take the weights alone, with model.init_from={path}"
            )
        state = RunState(**stored)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: its state.json cannot be read ({error})") from error
    names = {"seed": "run.seed", "global_batch_size": "train.global_batch_size",
             "order": "order of the samples", "trained": "what trains (freeze, lora)"}  # fmt: skip
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
    pairs = zip(state.shards, state.shard_times, expected.shard_times, strict=True)
    if touched := [shard.rpartition(" ")[0] for shard, then, now in pairs if then != now]:
        log.warning(
            "%d shards were written to, or copied, since %s, among them %s: their members are the same, and "
            "`launch/prepare_shards.py verify` tells whether these are whole", len(touched), path, touched[0],
        )  # fmt: skip
    same = {name: getattr(expected, name) for name in ("world_size", "zero_stage", "sub_group_size", "shard_times")}
    return replace(state, **same)


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

    What as many ranks wrote under the same ZeRO stage and sub_group_size in the same type, offloaded or not, is loaded
    as it is; all else is converted. Rates, betas, decay and clipping stay those of this run's configuration: only what
    the optimizer has gathered is loaded.
    Raises CheckpointError where DeepSpeed's files hold anything but tensors, plain values and `SAFE_GLOBALS`.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    stored = json.loads((path / STATE).read_text())
    written = stored["world_size"], stored["zero_stage"]
    now = torch.distributed.get_world_size(), int(engine.zero_optimization_stage())
    same_type = any((path / DEEPSPEED).glob("bf16_*")) == engine.bfloat16_enabled()  # DeepSpeed's names say it
    same_groups = now[1] < 3 or stored.get("sub_group_size") in (None, engine.zero_sub_group_size())
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed itself asks for unpickling of anything
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            if written == now and same_type and same_groups:
                with redirect_stdout(StringIO()):  # of ZeRO-1 in bf16 it prints what it calls
                    loaded, _ = engine.load_checkpoint(str(path), tag=DEEPSPEED, load_module_strict=False)
            else:
                other = " in another type" * (not same_type) + " with another sub_group_size" * (not same_groups)
                log.info(
                    "%s is of %d ranks under ZeRO-%d%s; converting it for %d under ZeRO-%d", path, *written, other, *now
                )
                convert(engine, path / DEEPSPEED, *written)
                loaded = str(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: nothing was loaded: a file in {DEEPSPEED}/ holds {refused_name(error) or 'what is no pickle'}, "
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
    engine.optimizer.clip_grad = engine.gradient_clipping()  # but for ZeRO-3 it would be the file's
