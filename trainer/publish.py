"""A trained model, ready to leave its run: whole, with a LoRA adapter beside or inside it, or a part of it.

    publish(run or checkpoint, out)                     real files, every byte as it was hashed
    publish(..., merge=True)  publish(..., dtype=...)   written anew
    publish(..., part="language_model" | "projector")

The folder has its name only when it is whole.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer import export
from trainer.card import OPEN, OPEN_ADAPTER
from trainer.errors import CheckpointError, ConfigError
from trainer.folders import EXPORT, check_export, find_export
from trainer.load import check_unchanged, image_transform, load_trained, trained_system_prompt
from trainer.lora import BASE, base_of, set_base
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.parts import write_language_model, write_projector


def publish(
    model: Path, out: Path, merge: bool = False, part: str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Writes what a run, checkpoint or export folder holds into a folder that is new or empty.

    merge: adds a LoRA adapter to its base; without it both are written, as base/ and hf/. part: that alone,
    with an adapter merged. dtype: of the weights; None for what they are stored in.

    Raises ConfigError for options that do not fit the model, CheckpointError where it is not whole, or
    the disk refuses `out`.
    """
    found = find_export(model)
    base = base_of(found)
    has_adapter = found != base
    check_export(base)
    if merge and not has_adapter:
        raise ConfigError(f"--merge: {found} has no LoRA adapter: the model is whole; leave --merge out")
    if dtype and has_adapter and not (merge or part):
        raise ConfigError("--dtype: a LoRA adapter and its base are copied as they are; give --merge too")
    check_free(out)
    check_unchanged(found)

    def write(partial: Path) -> None:
        if part or merge or dtype:
            _write(found, partial, part, dtype)
        elif has_adapter:
            _copy({base: partial / BASE, found: partial / EXPORT})
            set_base(partial / EXPORT, out / BASE)
        else:
            _copy({found: partial})

    into(out, write)


def check_free(out: Path) -> None:
    """Raises ConfigError where a folder to be written has something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: is there already, and not empty; choose another folder, or remove it")


def into(out: Path, write: Callable[[Path], None]) -> None:
    """Has a folder written, which gets its name when it is whole; its files have the usual permissions.

    Raises CheckpointError where the disk refuses it.
    """
    partial = out.resolve().with_name(f".{out.resolve().name}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed
        write(partial)
        mode = export.usual_file_mode()
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # safetensors makes files that the owner alone can read
        partial.rename(out.resolve())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(folders: dict[Path, Path]) -> None:
    """Copies files, and never their links: what is published shares nothing with a run."""
    files = {file: copy / file.name for folder, copy in folders.items() for file in folder.iterdir() if file.is_file()}
    for copy in folders.values():
        copy.mkdir(parents=True)
    with tqdm(total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True) as bar:
        for file, copy in files.items():
            bar.set_description(file.name)
            shutil.copyfile(file, copy)
            bar.update(copy.stat().st_size)


def _write(found: Path, folder: Path, part: str | None, dtype: torch.dtype | None) -> None:
    """Writes a loaded model, or a part of it. found: the export or adapter."""
    model, tokenizer = load_trained(found, dtype or "auto"), PreTrainedTokenizerFast.from_pretrained(found)
    if part == "language_model":
        write_language_model(model, tokenizer, folder)
    elif part == "projector":
        write_projector(model, folder)
    else:
        card = found / "README.md"
        about = card.read_text(encoding="utf-8").replace(OPEN_ADAPTER, OPEN) if card.is_file() else ""
        write_model(model, tokenizer, folder, trained_system_prompt(found), about)


def write_model(
    model: MQWenForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    system_prompt: str,
    card: str,
) -> None:
    """Writes an export. system_prompt: opens conversations without a system message. card: text of README.md."""
    export.describe(model)
    processor = export.make_processor(model, tokenizer, image_transform(model.config), system_prompt)
    weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}  # a tied one once
    export.write(model, weights, None, folder, processor, card, export.usual_file_mode())
