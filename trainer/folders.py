"""Folders of models that others wrote: what lies in them, and their weights, checked. Data is read, never code."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, CLIPVisionConfig, PretrainedConfig, PreTrainedModel, SiglipVisionConfig

from trainer.data.transform import ImageTransform
from trainer.errors import CheckpointError, ConfigError, refused_name
from trainer.lora import ADAPTER_CONFIG
from trainer.models.configuration_mqwen_vl import MQWenVLConfig
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_causal_lm import language_model_class
from trainer.models.modeling_mqwen_vl import TOWERS, MQWenForConditionalGeneration

LATEST = "latest"
"""File in a run folder that names its newest whole checkpoint."""

EXPORT = "hf"
"""Folder in a checkpoint that opens in Transformers; in a LoRA run's in PEFT, beside the base/ that it stands on."""

INDEX = "model.safetensors.index.json"
"""Says which file has which weight, where there are several."""

RESAMPLE = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that are known here, as preprocessor_config.json has them."""


def find_export(folder: Path) -> Path:
    """The Hugging Face folder that a path means: itself, that of a checkpoint, or of a run's latest checkpoint.

    Raises CheckpointError if it is none of these.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    candidates = [folder, folder / EXPORT]
    if (folder / LATEST).is_file():
        candidates.append(folder / (folder / LATEST).read_text().strip() / EXPORT)
    for candidate in candidates:
        if (candidate / "config.json").is_file() or (candidate / ADAPTER_CONFIG).is_file():
            return candidate
    raise CheckpointError(
        f"{folder}: neither a model folder (config.json), a LoRA adapter ({ADAPTER_CONFIG}), a checkpoint (hf/) nor a "
        f"run ({LATEST})"
    )


def check_export(folder: Path) -> None:
    """Raises CheckpointError if a folder does not hold an exported model."""
    found = read_json(folder / "config.json").get("model_type")
    if found != MQWenVLConfig.model_type:
        raise CheckpointError(f"{folder}: of architecture '{found}', expected an export ('{MQWenVLConfig.model_type}')")


def read_json(file: Path) -> dict[str, Any]:
    """Raises CheckpointError, naming the file, where it is no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: cannot be read (a {type(content).__name__}, expected an object)")
    return content


# --- Configurations ---


def language_config(folder: Path) -> PretrainedConfig:
    """Of a language model. Raises CheckpointError where it is none that can be used."""
    found = read_json(folder / "config.json").get("model_type")
    if found == QWenConfig.model_type:
        # The folder's own bf16 and fp16 would cast the transformer to another type than asked for.
        return QWenConfig.from_pretrained(folder, bf16=False, fp16=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        language_model_class(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: of architecture '{found}': {error}") from error
    return config


def tower_config(folder: Path) -> PretrainedConfig:
    """Of a vision tower, also where the folder holds the whole of CLIP or SigLIP."""
    found = str(read_json(folder / "config.json").get("model_type"))
    cls = SiglipVisionConfig if found.startswith(SiglipVisionConfig.model_type.split("_")[0]) else CLIPVisionConfig
    config = cls.from_pretrained(folder)
    if isinstance(config, SiglipVisionConfig):
        config.vision_use_head = False
    return config


def preprocessing(folder: Path) -> dict[str, Any]:
    """How a tower wants its pictures, as fields of `MQWenVLConfig`: by its preprocessor_config.json or, where that says
    nothing, as its family.

    Raises ConfigError for numbers that cannot be used.
    """
    file = folder / "preprocessor_config.json"
    found: dict[str, Any] = {"image_aspect": "crop", "image_mean": ImageTransform.mean, "image_std": ImageTransform.std}
    if isinstance(tower_config(folder), SiglipVisionConfig):
        found = {"image_aspect": "squash", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if not file.is_file():
        return found
    settings = read_json(file)
    for name in ("image_mean", "image_std"):
        if (values := settings.get(name)) is not None:
            numbers = isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)
            if not numbers or (name == "image_std" and min(values) <= 0):
                raise ConfigError(f"{file}: {name} is {values!r}, expected three numbers, for red, green and blue")
            found[name] = values
    if (number := settings.get("resample")) is not None:
        if number not in RESAMPLE:
            raise ConfigError(f"{file}: resample is {number!r}, expected 2 (bilinear) or 3 (bicubic)")
        found["image_resample"] = RESAMPLE[number]
    return found


# --- Weights ---


def read_model(config: PretrainedConfig, folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """An export, a language model or a vision tower, on the CPU.

    dtype: "auto" for the one it is stored in. Raises CheckpointError where weights are missing, too many, damaged or of
    other shapes.
    """
    is_tower = config.model_type in TOWERS
    if is_tower:
        cls = TOWERS[config.model_type]
    else:
        cls = MQWenForConditionalGeneration if isinstance(config, MQWenVLConfig) else language_model_class(config)
    found = stored_shapes(folder)
    if not is_tower:  # whose weights Transformers knows by several names
        _check_shapes(cls, config, found, folder)
    # What Transformers says of weights of other sizes is in a log; what it tells us has their names.
    options = {"trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = cls.from_pretrained(folder, config=config, dtype=dtype, **options)
    except pickle.UnpicklingError as error:
        raise refused_pickle(folder, error) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded as {cls.__name__}: {error}") from error
    if sizes := sorted(info["mismatched_keys"]):
        raise _other_shapes(folder, [f"{name} is {tuple(was)}, expected {tuple(size)}" for name, was, size in sizes])
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{folder}: {len(missing)} weights are missing, among them {', '.join(missing[:3])}")
    # Of a whole CLIP only the tower is wanted; elsewhere a weight without a place is of another model than config.json.
    if not is_tower and (surplus := sorted(info["unexpected_keys"])):
        raise CheckpointError(
            f"{folder}: {len(surplus)} weights have no place in it, among them {', '.join(surplus[:3])}"
        )
    return model


def _check_shapes(cls: Any, config: PretrainedConfig, found: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Raises CheckpointError, naming weights and shapes, where a folder's are not those of its config.json."""
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in cls(config).state_dict().items()}
    wrong = [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in expected.keys() & found.keys() if found[name] != expected[name]
    ]  # fmt: skip
    if wrong:
        raise _other_shapes(folder, sorted(wrong))


def _other_shapes(folder: Path, wrong: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder}: {len(wrong)} weights have other shapes than its config.json says, among them "
        f"{'; '.join(wrong[:3])}: a file of another model is in it"
    )


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each weight in a folder's safetensors, from the files' heads alone; empty if it has none.

    Raises CheckpointError, naming the file, where one is missing or damaged.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: cannot be read ({error!r})") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for file in [folder / name for name in names] or [single] * single.is_file():
        try:
            with safe_open(file, "pt") as content:
                shapes |= {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error}); copy the folder again") from error
    return shapes


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Tensors that `torch.save` wrote. Loads no code.

    Raises CheckpointError, naming the file, where it holds anything else, or is no such file.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise refused_pickle(file, error) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{file}: expected tensors by name")
    return content


def refused_pickle(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """What to say of a pickle that would have run code."""
    held = refused_name(error) or "what is no pickle of tensors"
    return CheckpointError(f"{path}: nothing was loaded: it holds {held}, expected tensors alone")
