"""The export: a folder that opens in Transformers without this package, with the modeling files beside the weights.

Frozen weights have files of their own, which later exports of a run share instead of writing them again.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from trainer.data.transform import ImageTransform
from trainer.dist import log
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration

INDEX = "model.safetensors.index.json"
FROZEN = "model-frozen"
TRAINED = "model-trained"
"""How the files' names begin; where nothing is frozen, they have Transformers' own names."""

MAX_FILE = "5GB"


def describe(model: MQWenForConditionalGeneration) -> None:
    """Sets what an export's config.json says of its weights and of the code that opens it."""
    model.config.auto_map = {
        "AutoConfig": "configuration_mqwen_vl.MQWenVLConfig",
        "AutoModelForCausalLM": "modeling_mqwen_vl.MQWenForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_mqwen_vl.MQWenForConditionalGeneration",
    }
    for part in (model.config.text_config, model.config.vision_config):
        part.__dict__.pop("auto_map", None)  # of the folder it came from
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype


def write(
    model: MQWenForConditionalGeneration,
    trained: dict[str, torch.Tensor],
    frozen: dict[str, torch.Tensor] | Path | None,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    transform: ImageTransform,
    file_mode: int,
) -> list[str]:
    """Writes the export of a model that `describe` has described; names of the files it shares with an earlier one.

    trained: weights on the CPU. frozen: the others, or an earlier export that has them, or None if there are none.
    file_mode: `usual_file_mode`, asked for where no other thread makes files.
    """
    folder.mkdir()
    linked: list[str] = []
    if isinstance(frozen, Path):
        linked = _link(frozen, folder)
        index = json.loads((frozen / INDEX).read_text())["weight_map"]
        names = {name: file for name, file in index.items() if file.startswith(FROZEN)}
    else:
        names = _save(frozen, folder, FROZEN) if frozen else {}
    names |= _save(trained, folder, "model" if frozen is None else TRAINED)
    if set(names.values()) != {"model.safetensors"}:
        size = sum((folder / file).stat().st_size for file in set(names.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if transform.aspect != "pad":  # for which Transformers has no image processor: config.json says image_aspect
        transform.to_processor().save_pretrained(folder)
    for file in (Path(__file__).parent / "models").glob("*.py"):
        if file.name != "__init__.py":
            shutil.copy(file, folder)
    for file in folder.iterdir():
        file.chmod(file_mode)  # safetensors makes files that the owner alone can read
    return linked


def usual_file_mode() -> int:
    """What the process's umask leaves of a file's permissions. The umask can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _save(weights: dict[str, torch.Tensor], folder: Path, start: str) -> dict[str, str]:
    """Writes weights; the file of each, by name."""
    shards = split_torch_state_dict_into_shards(
        weights, filename_pattern=start + "{suffix}.safetensors", max_shard_size=MAX_FILE
    )
    for file, names in shards.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
    return shards.tensor_to_filename


def frozen_files(folder: Path) -> list[str]:
    """Names of the files in an export that hold frozen weights."""
    return sorted(file.name for file in folder.glob(f"{FROZEN}*.safetensors"))


def _link(earlier: Path, folder: Path) -> list[str]:
    """Gives the frozen files of an earlier export a second name here, or copies them; names of those that are linked.

    A link and not a reference: whichever export is removed first, the other stays whole.
    """
    linked = []
    for file in frozen_files(earlier):
        try:
            os.link(earlier / file, folder / file)
            linked.append(file)
        except FileNotFoundError:
            raise
        except OSError as error:  # not every file system has links, and none from another
            log.warning("%s: no links here (%s): frozen weights are copied", folder, error.strerror)
            shutil.copyfile(earlier / file, folder / file)
    return linked
