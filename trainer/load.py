"""Model and tokenizer that a configuration names, from folders on disk."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.config import Config, DataConfig, ModelConfig
from trainer.data.transform import ImageTransform
from trainer.dist import log
from trainer.errors import CheckpointError, ConfigError
from trainer.folders import (
    EXPORT,
    check_export,
    find_export,
    language_config,
    preprocessing,
    read_json,
    read_model,
    tower_config,
)
from trainer.lora import BASE, add_adapter, base_of, merge
from trainer.manifest import MANIFEST, check_whole
from trainer.models.configuration_mqwen_vl import MQWenVLConfig
from trainer.models.configuration_qwen import QWenConfig
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.models.tokenization_qwen import END_OF_TEXT, IM_END
from trainer.tokenizer import IMAGE_PAD, image_token_id, load_tokenizer, placeholder_of


def load_trained(folder: Path, dtype: torch.dtype | str = "auto") -> MQWenForConditionalGeneration:
    """The plain model of a run, checkpoint, export or LoRA adapter, which is merged into its base; on the CPU.

    dtype: "auto" for the one it is stored in. Raises CheckpointError where there is none, or weights are missing.
    """
    export = find_export(folder)
    base = base_of(export)
    model = _read_export(base, dtype)
    return merge(model, export) if base != export else model


def _read_export(folder: Path, dtype: torch.dtype | str) -> MQWenForConditionalGeneration:
    check_export(folder)
    model = read_model(MQWenVLConfig.from_pretrained(folder), folder, dtype)
    assert isinstance(model, MQWenForConditionalGeneration)
    return model


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
    if settings.init_from or resumed_from:
        start = resumed_from or Path(settings.init_from or "")
        # A resumed run's adapter is in the checkpoint's own state.
        model = _read_export(base_of(find_export(start)), dtype) if resumed_from else load_trained(start, dtype)
        _check_same_stage_settings(settings, model, image_token_id(tokenizer), start)
        if resumed_from:
            _check_same_model(settings, model, resumed_from)
    else:
        tower, language_model = Path(settings.vision_tower or ""), Path(settings.language_model or "")
        model = MQWenForConditionalGeneration.from_parts(
            read_model(tower_config(tower), tower, dtype),
            read_model(language_config(language_model), language_model, dtype),
            seed=config.run.seed,
            image_token_id=image_token_id(tokenizer),
            **new_settings(settings),
        )
        if not isinstance(model.config.text_config, QWenConfig):
            check_computes(model.language_model, language_model, config.data.packing)
    check_fit(config, model.config, tokenizer)
    model.generation_config = generation_config(tokenizer)
    if config.lora:
        add_adapter(model, config.lora, config.run.seed)
    return model


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """An answer ends with its turn, or with the text."""
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (IM_END, END_OF_TEXT)]
    return GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)


def new_settings(settings: ModelConfig) -> dict[str, Any]:
    """How a model that is joined from two folders sees, as fields of `MQWenVLConfig`."""
    layer, found = settings.vision_feature_layer, preprocessing(Path(settings.vision_tower or ""))
    aspect = settings.image_aspect or found["image_aspect"]
    names = {key: Path(getattr(settings, key) or "").name for key in ("language_model", "vision_tower")}
    layer = -1 if layer is None else layer
    return {**found, "vision_feature_layer": layer, "image_aspect": aspect, "base_models": names}


@torch.no_grad()
def check_computes(language_model: Any, folder: Path, packing: bool) -> None:
    """Raises ConfigError where what a language model of Transformers computes is not what training takes it for: logits
    that its head makes of the last hidden state and, for packs, documents that do not see each other."""
    ids, kind = torch.arange(5)[None], language_model.config.model_type
    alone = language_model(ids[:, 2:], use_cache=False).logits.float()
    embeds = language_model.get_input_embeddings()(ids[:, 2:])
    hidden_states = language_model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
    if not torch.allclose(alone, language_model.get_output_embeddings()(hidden_states).float(), rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"model.language_model: {folder}: the logits of a '{kind}' are not its head times its last hidden state, "
            f"from which the loss is computed here; choose a model without scaled or capped logits, as Qwen's are"
        )
    if not packing:
        return
    bounds, positions = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([[0, 1, 0, 1, 2]])
    try:
        packed = language_model(ids, position_ids=positions, cu_seq_lens_q=bounds, max_length_q=3).logits[:, 2:].float()
        apart = (packed - alone).abs().max() <= 0.05 * alone.abs().max()  # in bf16 the last bits differ
    except (RuntimeError, ValueError, TypeError):
        apart = False
    if not apart:
        raise ConfigError(
            f"model.language_model: {folder}: packed documents would see each other in a '{kind}', whose attention is "
            f"not Transformers' common one: set data.packing=false"
        )


def meta_model(config: Config, tokenizer: PreTrainedTokenizerBase | None = None) -> MQWenForConditionalGeneration:
    """The model that training starts from on the meta device: names, shapes and types, from config.json alone.

    No weights are read. tokenizer: None where there is none to check against. Raises as `load_model` does.
    """
    settings, token = config.model, {}
    if tokenizer is not None:
        token = {"image_token_id": image_token_id(tokenizer)}
    if settings.init_from:
        folder = base_of(find_export(Path(settings.init_from)))
        check_export(folder)
        sizes = MQWenVLConfig.from_pretrained(folder)
    else:
        text = language_config(Path(settings.language_model or ""))
        vision = tower_config(Path(settings.vision_tower or ""))
        sizes = MQWenVLConfig(text, vision, **token, **new_settings(settings))
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
        if placeholder_of(tokenizer) == IMAGE_PAD and image_token_id(tokenizer) == text.vocab_size:
            errors.append(
                f"the tokenizer has no placeholder for pictures, and the language model's vocabulary of "
                f"{text.vocab_size} no free row for {IMAGE_PAD}: use a model with one, as Qwen2 or Qwen2.5"
            )
        else:
            errors.append(
                f"the language model's vocabulary of {text.vocab_size} is smaller than the tokenizer's "
                f"{len(tokenizer)}: name the folder of its own tokenizer in model.tokenizer"
            )
    name, context = context_length(text)
    if max_length > context:
        errors.append(f"data.max_length={max_length} is beyond the model's {name}={context}")
    if max_length <= sizes.image_context_length:
        errors.append(
            f"data.max_length={max_length} has no room for text beside an image of {sizes.image_context_length} "
            f"features: raise it"
        )
    if errors:
        raise ConfigError("; ".join(errors))


def context_length(text: PretrainedConfig) -> tuple[str, int]:
    """Tokens that a language model of this configuration reads and writes at most, and by which name it says so."""
    name = "seq_length" if isinstance(text, QWenConfig) else "max_position_embeddings"
    return name, getattr(text, name)


def model_config(settings: ModelConfig) -> MQWenVLConfig:
    """How the model of these settings sees, from its config.json alone; of a new one the language model is left out."""
    if settings.init_from:
        return MQWenVLConfig.from_pretrained(base_of(find_export(Path(settings.init_from))))
    vision = tower_config(Path(settings.vision_tower or ""))
    return MQWenVLConfig(vision_config=vision, **new_settings(settings))


SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
"""Of a language model or tower, by the names in config.json: what tells one size from another."""


def _check_same_model(settings: ModelConfig, model: MQWenForConditionalGeneration, resumed_from: Path) -> None:
    """Raises CheckpointError where a checkpoint's model is of another size than the folders that the run names."""
    parts: dict[str, PretrainedConfig] = {
        "language_model": model.config.text_config, "vision_tower": model.config.vision_config
    }  # fmt: skip
    differing = []
    for key, config in parts.items():
        if folder := getattr(settings, key):
            named = read_json(Path(folder) / "config.json")
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


def trained_system_prompt(export: Path) -> str:
    """The system prompt that an export was trained with, if it says so, or else the default of data.system_prompt."""
    file = base_of(export) / "processor_config.json"
    return (read_json(file) if file.is_file() else {}).get("system_prompt", DataConfig().system_prompt)


def image_transform(config: MQWenVLConfig) -> ImageTransform:
    """How the pictures of a model with this configuration become pixels."""
    mean, std = config.image_mean or ImageTransform.mean, config.image_std or ImageTransform.std
    size, aspect = config.vision_config.image_size, config.image_aspect
    return ImageTransform(size, aspect, tuple(mean), tuple(std), config.image_resample)
