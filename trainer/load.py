"""Model and tokenizer that a configuration names, from folders on disk."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trainer.config import Config, DataConfig, ModelConfig
from trainer.data.transform import ImageTransform
from trainer.dist import log
from trainer.errors import CheckpointError, ConfigError
from trainer.lora import ADAPTER_CONFIG, BASE, add_adapter, base_of, merge
from trainer.manifest import MANIFEST, check_whole
from trainer.models.configuration_mqwen_vl import MQWenVLConfig
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_mqwen import MQWenLMHeadModel
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.models.tokenization_qwen import (
    END_OF_TEXT,
    IM_END,
    IMAGE_PLACEHOLDER,
    VOCABULARY_FILE,
    build_tokenizer,
)

LATEST = "latest"
"""File in a run folder that names its newest whole checkpoint."""

EXPORT = "hf"
"""Folder in a checkpoint that opens in Transformers; in a LoRA run's in PEFT, beside the base/ that it stands on."""


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


def load_trained(folder: Path, dtype: torch.dtype | str = "auto") -> MQWenForConditionalGeneration:
    """The plain model of a run, checkpoint, export or LoRA adapter, which is merged into its base; on the CPU.

    dtype: "auto" for the one it is stored in. Raises CheckpointError where there is none, or weights are missing.
    """
    export = find_export(folder)
    model = _load(MQWenForConditionalGeneration, base_of(export), dtype)
    return merge(model, export) if base_of(export) != export else model


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.tokenizer`, or else of the model that training starts from; no remote code.

    Raises ConfigError if the folder has none, or one without the control tokens.
    """
    folder = Path(model.tokenizer or model.language_model or find_export(Path(model.init_from or "")))
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder, where a tokenizer was expected")
    if (folder / VOCABULARY_FILE).is_file():
        try:
            tokenizer = build_tokenizer(folder / VOCABULARY_FILE)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    elif (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        raise ConfigError(f"{folder}: no {VOCABULARY_FILE} and no tokenizer.json; name their folder in model.tokenizer")
    missing = {END_OF_TEXT, IM_END, IMAGE_PLACEHOLDER} - tokenizer.get_vocab().keys()
    if missing:
        raise ConfigError(f"{folder}: the tokenizer lacks the control tokens {', '.join(sorted(missing))}")
    return tokenizer


def load_model(
    config: Config, tokenizer: PreTrainedTokenizerBase, resumed_from: Path | None = None
) -> MQWenForConditionalGeneration:
    """The model that training starts from, on the CPU, in bf16 or fp32 as the configuration says.

    resumed_from: checkpoint that the run goes on from; its own export has the frozen weights too, whatever has become
    of the folders that the run once started from.

    Raises ConfigError where settings, tokenizer and model do not fit together, CheckpointError where weights are
    missing or of other shapes.
    """
    settings, dtype = config.model, torch.bfloat16 if config.train.bf16 else torch.float32
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    if settings.init_from or resumed_from:
        start = resumed_from or Path(settings.init_from or "")
        if resumed_from:  # its adapter is in the checkpoint's own state
            model = _load(MQWenForConditionalGeneration, base_of(find_export(start)), dtype)
        else:
            model = load_trained(start, dtype)
        _check_same_stage_settings(settings, model, image_token_id, start)
        if resumed_from:
            _check_same_model(settings, model, resumed_from)
    else:
        model = MQWenForConditionalGeneration.from_parts(
            _load(CLIPVisionModel, Path(settings.vision_tower or ""), dtype),
            # The folder's own bf16 and fp16 would cast the transformer to another type than asked for.
            _load(MQWenLMHeadModel, Path(settings.language_model or ""), dtype, bf16=False, fp16=False),
            seed=config.run.seed,
            image_token_id=image_token_id,
            **_new_settings(settings),
        )
    check_fit(config, model.config, tokenizer)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in (IM_END, END_OF_TEXT)],
        pad_token_id=tokenizer.pad_token_id,
    )
    if config.lora:
        add_adapter(model, config.lora, config.run.seed)
    return model


def _new_settings(settings: ModelConfig) -> dict[str, Any]:
    """How a model that is joined from two folders sees."""
    layer = settings.vision_feature_layer
    return {
        "vision_feature_layer": -1 if layer is None else layer,
        "image_aspect": settings.image_aspect or "crop",
        "base_models": {key: Path(getattr(settings, key)).name for key in ("language_model", "vision_tower")},
    }


def meta_model(config: Config, tokenizer: PreTrainedTokenizerBase | None = None) -> MQWenForConditionalGeneration:
    """The model that training starts from on the meta device: names, shapes and types, from config.json alone.

    No weights are read. tokenizer: None where there is none to check against. Raises as `load_model` does.
    """
    settings, token = config.model, {}
    if tokenizer is not None:
        token = {"image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)}
    if settings.init_from:
        folder = base_of(find_export(Path(settings.init_from)))
        check_export(folder)
        sizes = MQWenVLConfig.from_pretrained(folder)
    else:
        text = QWenConfig.from_pretrained(Path(settings.language_model or ""), bf16=False, fp16=False)
        vision = CLIPVisionConfig.from_pretrained(Path(settings.vision_tower or ""))
        sizes = MQWenVLConfig(text, vision, **token, **_new_settings(settings))
    with torch.device("meta"):
        model = MQWenForConditionalGeneration(sizes).to(torch.bfloat16 if config.train.bf16 else torch.float32)
    if settings.init_from:
        _check_same_stage_settings(settings, model, token.get("image_token_id", sizes.image_token_id), folder)
    check_fit(config, sizes, tokenizer)
    if config.lora:
        with torch.device("meta"):
            add_adapter(model, config.lora, config.run.seed)
    return model


def check_fit(config: Config, sizes: MQWenVLConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises ConfigError, for all at once, where settings, model and tokenizer do not fit together."""
    text, max_length, errors = sizes.text_config, config.data.max_length, []
    layers = sizes.vision_config.num_hidden_layers
    if not -layers - 1 <= sizes.vision_feature_layer <= layers:
        errors.append(f"model.vision_feature_layer={sizes.vision_feature_layer}: the tower has {layers} layers")
    if tokenizer is not None and text.vocab_size < len(tokenizer):
        errors.append(
            f"the language model's vocabulary of {text.vocab_size} is smaller than the tokenizer's {len(tokenizer)}: "
            f"name the folder of its own tokenizer in model.tokenizer"
        )
    if max_length > text.seq_length:
        errors.append(f"data.max_length={max_length} is beyond the model's seq_length={text.seq_length}")
    if max_length <= sizes.image_context_length:
        errors.append(
            f"data.max_length={max_length} has no room for text beside an image of {sizes.image_context_length} "
            f"features: raise it"
        )
    if errors:
        raise ConfigError("; ".join(errors))


def model_config(settings: ModelConfig) -> MQWenVLConfig:
    """How the model of these settings sees, from its config.json alone; of a new one the language model is left out."""
    if settings.init_from:
        return MQWenVLConfig.from_pretrained(base_of(find_export(Path(settings.init_from))))
    vision = CLIPVisionConfig.from_pretrained(Path(settings.vision_tower or ""))
    return MQWenVLConfig(vision_config=vision, image_aspect=settings.image_aspect or "crop")


def check_export(folder: Path) -> None:
    """Raises CheckpointError if a folder does not hold an exported model."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its config.json cannot be read ({error})") from error
    if found != MQWenVLConfig.model_type:
        raise CheckpointError(f"{folder}: of architecture '{found}', expected an export ('{MQWenVLConfig.model_type}')")


def _load(cls: type[PreTrainedModel], folder: Path, dtype: torch.dtype | str, **settings: bool) -> PreTrainedModel:
    if cls is MQWenForConditionalGeneration:
        check_export(folder)
    if cls is not CLIPVisionModel:  # Transformers knows its weights by several names
        _check_shapes(cls, folder)
    options = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True, **settings}
    try:
        model, info = cls.from_pretrained(folder, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded as {cls.__name__}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{folder}: {len(missing)} weights are missing, among them {', '.join(missing[:3])}")
    # Of a whole CLIP only the tower is wanted; elsewhere a weight without a place is of another model than config.json.
    if cls is not CLIPVisionModel and (surplus := sorted(info["unexpected_keys"])):
        raise CheckpointError(
            f"{folder}: {len(surplus)} weights have no place in it, among them {', '.join(surplus[:3])}"
        )
    return model


SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
"""Of a language model or tower, by the names in config.json: what tells one size from another."""


def _check_same_model(settings: ModelConfig, model: MQWenForConditionalGeneration, resumed_from: Path) -> None:
    """Raises CheckpointError where a checkpoint's model is of another size than the folders that the run names."""
    parts = {"language_model": model.config.text_config, "vision_tower": model.config.vision_config}
    differing = []
    for key, config in parts.items():
        if folder := getattr(settings, key):
            named = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
            named = named.get("vision_config", named) if key == "vision_tower" else named
            differing += [
                f"{name} of model.{key} is {named[name]}, of the checkpoint {getattr(config, name)}"
                for name in SHAPE if name in named and named[name] != getattr(config, name, named[name])
            ]  # fmt: skip
    if differing:
        raise CheckpointError(
            f"{resumed_from}: of another model than this run's: {'; '.join(differing)}. Name its folders, or choose "
            f"another run.output_dir"
        )


def _check_shapes(cls: type[PreTrainedModel], folder: Path) -> None:
    """Raises CheckpointError, naming weights and shapes, where a folder's are not those of its config.json."""
    found = stored_shapes(folder)
    config = cls.config_class.from_pretrained(folder)
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in cls(config).state_dict().items()}
    wrong = [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in expected.keys() & found.keys() if found[name] != expected[name]
    ]  # fmt: skip
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} weights have other shapes than its config.json says, among them "
            f"{'; '.join(sorted(wrong)[:3])}: a file of another model is in it"
        )


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each weight in a folder's safetensors, from the files' heads alone; empty if it has none.

    Raises CheckpointError, naming the file, where one is missing or damaged.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
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


def check_unchanged(export: Path) -> None:
    """Raises CheckpointError where an export, or the base of an adapter, is not as its checkpoint's manifest says."""
    for folder in sorted({export, base_of(export)}):
        if folder.name in (EXPORT, BASE) and (folder.parent / MANIFEST).is_file():
            check_whole(folder.parent, within=f"{folder.name}/")
        else:
            log.info("%s lies outside its checkpoint, whose %s has its hashes: not compared", folder, MANIFEST)


def check_handover(settings: ModelConfig) -> None:
    """Raises CheckpointError or ConfigError where an earlier stage's export is not as it was written, or is given
    another tokenizer than it was trained with. What the model itself shows is checked as it is loaded."""
    export = find_export(Path(settings.init_from or ""))
    check_unchanged(export)
    if settings.tokenizer and (export / "tokenizer.json").is_file():
        trained = PreTrainedTokenizerFast.from_pretrained(export).get_vocab()
        given = load_tokenizer(settings).get_vocab()
        differing = sorted(token for token in trained.keys() | given.keys() if trained.get(token) != given.get(token))
        if differing:
            first = differing[0]
            raise ConfigError(
                f"model.tokenizer={settings.tokenizer}: {len(differing)} tokens have other ids than in {export}, with "
                f"which the model was trained, among them {first!r} ({given.get(first)}, was {trained.get(first)}); "
                f"leave model.tokenizer out"
            )


def _check_same_stage_settings(
    settings: ModelConfig, model: MQWenForConditionalGeneration, image_token_id: int, folder: Path
) -> None:
    """folder: that the model was read from."""
    errors = [
        f"model.{name} is {wanted!r}, but {folder} was trained with {getattr(model.config, name)!r}"
        for name in ("vision_feature_layer", "image_aspect")
        if (wanted := getattr(settings, name)) is not None and wanted != getattr(model.config, name)
    ]
    if image_token_id != model.config.image_token_id:
        errors.append(f"the tokenizer's placeholder is {image_token_id}, the model's {model.config.image_token_id}")
    if errors:
        raise ConfigError("; ".join(errors))


def system_prompt(export: Path) -> str:
    """What an export's model was trained to begin conversations with, where they have no system message; of a folder
    that does not say, the default of data.system_prompt."""
    file = base_of(export) / "processor_config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found.get("system_prompt", DataConfig().system_prompt)


def image_transform(model: MQWenForConditionalGeneration) -> ImageTransform:
    """How this model's pictures become pixels."""
    return ImageTransform(model.config.vision_config.image_size, model.config.image_aspect)
