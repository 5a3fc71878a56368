"""Checkpoints: whole or not there.

    output_dir/checkpoint-000500/{deepspeed/, hf/, state.json, manifest.json}     output_dir/latest

Everything is written into a folder with another name; only when all ranks are done does it get its own, and only then
does `latest` point to it. `deepspeed/` continues this run; `hf/` opens in Transformers and starts another stage.
Frozen weights are in `hf/` alone, and a resumed run takes them from there.
"""

import json
import math
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from trainer.config import CheckpointConfig
from trainer.convert import convert
from trainer.data.transform import ImageTransform
from trainer.data.writer import sync, write_whole
from trainer.dist import gather, log, on_ranks, raise_together
from trainer.engine import full_state_dict
from trainer.engine_files import file_hash
from trainer.errors import CheckpointError
from trainer.load import EXPORT, LATEST
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration

FORMAT = 2
DEEPSPEED = "deepspeed"
"""Tag, and so folder, of DeepSpeed's own files."""

MANIFEST = "manifest.json"
"""File in a checkpoint that lists its files, each with bytes and SHA-256."""

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
    retention: CheckpointConfig,
) -> Path:
    """Writes one checkpoint, then moves `latest` to it and removes the oldest. All ranks call this.

    Raises CheckpointError on all ranks, and leaves everything as it was, where one of them cannot write its part.
    """
    final = output_dir / name_of(state.step)
    partial = output_dir / f".{final.name}.partial"
    is_main = engine.global_rank == 0

    def start() -> None:
        shutil.rmtree(partial, ignore_errors=True)  # left by a save that was killed
        partial.mkdir()

    def finish() -> None:
        export(engine.module, weights, partial / EXPORT, tokenizer, transform)
        _write_json(partial / "state.json", asdict(state))
        for file in [partial / "state.json", *(partial / EXPORT).iterdir()]:
            sync(file)
            hashes[str(file.relative_to(partial))] = file_hash(file)
        _write_json(
            partial / MANIFEST, {name: [(partial / name).stat().st_size, hashes[name]] for name in sorted(hashes)}
        )
        for path in (partial / MANIFEST, partial / DEEPSPEED, partial / EXPORT, partial):
            sync(path)
        _announce(partial, final)
        remove_old(output_dir, final, retention)

    on_ranks(is_main, lambda: _named(final, start))
    engine.save_checkpoint(str(partial), tag=DEEPSPEED, save_latest=False, exclude_frozen_parameters=True)
    weights = full_state_dict(engine)
    written, failure = engine.checkpoint_engine.take()
    try:
        raise_together(_refusal(final, failure) if failure else None)
        own = {str(file.relative_to(partial)): digest for file, digest in written.items()}
        hashes = {name: digest for of_rank in gather(own) for name, digest in of_rank.items()}
        on_ranks(is_main, lambda: _named(final, finish))
    except CheckpointError:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    log.info("saved %s", final)
    return final


def _named(final: Path, task: Callable[[], None]) -> None:
    """Runs a part of saving; what the disk refuses becomes a CheckpointError."""
    try:
        task()
    except (OSError, SafetensorError) as error:
        raise _refusal(final, error) from error


def _refusal(final: Path, error: Exception) -> CheckpointError:
    # PyTorch's writer says where it failed; what the disk said is behind it.
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
    return CheckpointError(
        f"{final}: cannot be saved ({reason}); the checkpoints before it are as they were. Make room, or mend the "
        f"folder, and start again: --resume auto goes on from the last whole one"
    )


def _announce(partial: Path, final: Path) -> None:
    """Gives a whole checkpoint its name, and then moves the pointer to it."""
    output_dir, replaced = final.parent, final.with_name(f".{final.name}.replaced")
    if final.exists():  # saved before, by a run that went on from an older one
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    sync(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    write_whole(output_dir / LATEST, final.name + "\n")


def remove_old(output_dir: Path, newest: Path, retention: CheckpointConfig) -> None:
    """Removes the oldest checkpoints, but never the newest, the best, or one that is kept for its step."""
    if not retention.keep_last:
        return
    # After a resume from an older checkpoint the newest is not the one with the highest step.
    others = [path for path in existing(output_dir) if path != newest]
    for old in others[: max(0, len(others) + 1 - retention.keep_last)]:
        kept_for_its_step = retention.keep_every and int(old.name.rpartition("-")[2]) % retention.keep_every == 0
        if not kept_for_its_step and old.name != _read_best(output_dir).get("checkpoint"):
            shutil.rmtree(old)


def note_best(output_dir: Path, step: int, held_out_loss: float) -> None:
    """Points best.json to a step's checkpoint, if there is one and its held-out loss is the lowest so far."""
    if (output_dir / name_of(step)).is_dir() and held_out_loss < _read_best(output_dir).get("held_out_loss", math.inf):
        best = {"checkpoint": name_of(step), "held_out_loss": held_out_loss}
        write_whole(output_dir / BEST, json.dumps(best) + "\n")


def _read_best(output_dir: Path) -> dict[str, Any]:
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
            raise CheckpointError(f"{resume}: not a whole checkpoint: no such folder")
        check_whole(Path(resume))
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
    return None


def clear(output_dir: Path) -> None:
    """Removes the checkpoints of a run, for one that starts anew in its folder."""
    for name in (LATEST, BEST):
        (output_dir / name).unlink(missing_ok=True)
    for path in existing(output_dir):
        shutil.rmtree(path)


def check_whole(path: Path) -> None:
    """Raises CheckpointError, naming the file, where a checkpoint is not what its manifest says, byte for byte."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if not manifest or not isinstance(manifest, dict):
            raise ValueError("it lists no file")
        files = {name: (int(size), str(digest)) for name, (size, digest) in manifest.items()}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint: its {MANIFEST} cannot be read ({error})") from error
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise CheckpointError(f"{path}: not whole: {name} should have {size} bytes, found {found}")
        if file_hash(file) != digest:
            raise CheckpointError(f"{path}: not whole: {name} has other bytes than were written")


def read_state(path: Path, expected: RunState) -> RunState:
    """The state in a checkpoint, with the geometry of now: `load` sees to a change of that.

    Raises CheckpointError if it is of another stream of samples.
    """
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
             "order": "order of the samples"}  # fmt: skip
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
    return replace(state, world_size=expected.world_size, zero_stage=expected.zero_stage)


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

    What as many ranks wrote under the same ZeRO stage, offloaded or not, is loaded as it is; all else is converted.
    Rates, betas and decay stay those of this run's configuration: only what the optimizer has gathered is loaded.
    Raises CheckpointError where DeepSpeed's files hold anything but tensors, plain values and `SAFE_GLOBALS`.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    written = _geometry(path)
    now = torch.distributed.get_world_size(), int(engine.zero_optimization_stage())
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed itself asks for unpickling of anything
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            if written == now:
                loaded, _ = engine.load_checkpoint(str(path), tag=DEEPSPEED, load_module_strict=False)
            else:
                log.info("%s is of %d ranks under ZeRO-%d; converting it for %d under ZeRO-%d", path, *written, *now)
                convert(engine, path / DEEPSPEED, path / EXPORT, *written)
                loaded = str(path)
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


def _geometry(path: Path) -> tuple[int, int]:
    """(ranks, ZeRO stage) that DeepSpeed's files in a checkpoint are cut for."""
    stored = json.loads((path / "state.json").read_text())
    return stored["world_size"], stored["zero_stage"]


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
