"""MQWenVLConfig: vision tower, projector and language model, as one configuration."""

from transformers import CONFIG_MAPPING, AutoConfig, CLIPVisionConfig, PretrainedConfig

from .configuration_qwen import QWenConfig


class MQWenVLConfig(PretrainedConfig):
    """Configuration of `MQWenForConditionalGeneration`.

    text_config, vision_config: a config or its dict (Qwen v1, or by its `model_type` any causal language model of
    Transformers; CLIP's or SigLIP's vision part, without its pooling head).
    image_token_id: the placeholder's id. The default is Qwen's `<|extra_0|>`.
    vision_feature_layer: hidden state of the tower that is projected; -1 is its last (the notes), -2 the one before
    (LLaVA). The class token, where there is one, is removed.
    image_aspect: how pictures become square: "crop", "pad" or "squash".
    base_models: names of the folders that training began with, {"language_model": ..., "vision_tower": ...}.
    image_mean, image_std: of the pictures that the tower was trained on; None for CLIP's.
    image_resample: the filter that resizes them, "bicubic" or "bilinear".
    """

    model_type = "mqwen_vl"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        image_token_id=151646,
        vision_feature_layer=-1,
        image_aspect="crop",
        base_models=None,
        image_mean=None,
        image_std=None,
        image_resample="bicubic",
        **kwargs,
    ):
        self.text_config = _sub_config(text_config, QWenConfig)
        self.vision_config = _sub_config(vision_config, CLIPVisionConfig)
        if self.vision_config.model_type == "siglip_vision_model":
            self.vision_config.vision_use_head = False  # nothing reads it, so it would get no gradient
        self.image_token_id = image_token_id
        self.vision_feature_layer = vision_feature_layer
        self.image_aspect = image_aspect
        self.image_mean = image_mean
        self.image_std = image_std
        self.image_resample = image_resample
        self.base_models = base_models or {}
        kwargs.setdefault("tie_word_embeddings", False)  # of a language model that ties them, text_config says it
        super().__init__(**kwargs)

    @property
    def image_context_length(self) -> int:
        """Features an image gives: the patches of the square picture."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def vision_layers_read(self) -> int:
        """Layers of the tower up to the one that is projected; those behind it are not computed."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer


def _sub_config(config, default: type[PretrainedConfig]) -> PretrainedConfig:
    """A config from its dict. Qwen v1 is not among those that Transformers knows by `model_type`."""
    if isinstance(config, PretrainedConfig):
        return config
    config = dict(config or {})
    model_type = config.pop("model_type", default.model_type)
    return (default if model_type == default.model_type else CONFIG_MAPPING[model_type])(**config)
