"""The export: a folder that opens in Transformers without this package, with the modeling files beside the weights.

Frozen weights have files of their own, which later exports of a run share instead of writing them again.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from trainer.data.transform import ImageTransform
from trainer.dist import log
from trainer.errors import CheckpointError
from trainer.folders import INDEX, stored_shapes
from trainer.lora import is_adapter, stored_name
from trainer.models.image_processing_mqwen_vl import MQWenVLImageProcessor
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.models.processing_mqwen_vl import MQWenVLProcessor, chat_template

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
        part.__dict__.pop("auto_map", None)  # of the folder it came from,
        part._name_or_path = ""  # which is nowhere else
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype


def write(
    model: MQWenForConditionalGeneration,
    trained: dict[str, torch.Tensor],
    frozen: dict[str, torch.Tensor] | Path | None,
    folder: Path,
    processor: MQWenVLProcessor,
    card: str,
    file_mode: int,
) -> list[str]:
    """Writes the export of a model that `describe` has described; names of the files it shares with an earlier one.

    trained: weights on the CPU. frozen: the others, or an earlier export that has them, or None if there are none.
    card: text of README.md. file_mode: `usual_file_mode`, asked for where no other thread makes files.

    Raises CheckpointError, by name, where a weight of the model is missing, empty or of another shape.
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
    check_complete(model, folder)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # for who asks for it alone
    (folder / "README.md").write_text(card, encoding="utf-8")
    for file in (Path(__file__).parent / "models").glob("*.py"):
        if file.name != "__init__.py":
            shutil.copy(file, folder)
    for file in folder.iterdir():
        file.chmod(file_mode)  # safetensors makes files that the owner alone can read
    return linked


def make_processor(
    model: MQWenForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    transform: ImageTransform,
    system_prompt: str,
) -> MQWenVLProcessor:
    """The processor that goes with a model: pictures and text as in training. Sets the tokenizer up for it.

    system_prompt: opens conversations that have no system message.
    """
    pictures = picture_processor(transform)
    image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    tokenizer.chat_template = chat_template(image_token, system_prompt)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # answers begin where all prompts end
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    processor = MQWenVLProcessor(
        pictures, tokenizer, tokenizer.chat_template, image_token, model.config.image_context_length, system_prompt
    )
    processor.auto_map = {"AutoProcessor": "processing_mqwen_vl.MQWenVLProcessor"}
    return processor


def picture_processor(transform: ImageTransform) -> MQWenVLImageProcessor:
    """The image processor that makes the pixels of a transform, within one level where it shrinks them a lot."""
    square = {"height": transform.size, "width": transform.size}
    made = MQWenVLImageProcessor(
        transform.aspect,
        square,
        image_mean=list(transform.mean),
        image_std=list(transform.std),
        resample=Image.Resampling[transform.resample.upper()],
    )
    made.auto_map = {"AutoImageProcessor": "image_processing_mqwen_vl.MQWenVLImageProcessor"}
    return made


def check_complete(model: MQWenForConditionalGeneration, folder: Path) -> None:
    """Raises CheckpointError where the weights that a folder's files hold are not the model's, by name and shape."""
    # Of a parameter that ZeRO-3 has cut up, the shape it has when it is whole.
    expected = {
        stored_name(name): tuple(getattr(p, "ds_shape", p.shape))
        for name, p in model.named_parameters() if not is_adapter(name)
    }  # fmt: skip
    found = stored_shapes(folder)
    wrong = [
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys()) if found.get(name) != expected.get(name)
    ]  # fmt: skip
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} weights were not written as they are in the model, among them "
            f"{'; '.join(wrong[:3])}: the checkpoint does not count, the ones before are whole. This is a fault of the "
            f"trainer"
        )


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
