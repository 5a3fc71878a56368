"""MQWenVLConfig: vision tower, projector and language model, as one configuration."""

from transformers import CONFIG_MAPPING, AutoConfig, CLIPVisionConfig, PretrainedConfig

from .configuration_qwen import QWenConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training pictures, red green blue, 0 to 1. (source: CLIP's preprocessor_config.json)"""

SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
"""(source: SigLIP's preprocessor_config.json)"""


class MQWenVLConfig(PretrainedConfig):
    """Configuration of `MQWenForConditionalGeneration`.

    text_config, vision_config: a config or its dict (Qwen v1, or by its `model_type` any causal language model of
    Transformers; CLIP's or SigLIP's vision part, without its pooling head).
    image_token_id: the placeholder's id. The default is Qwen's `<|extra_0|>`.
    vision_feature_layer: hidden state of the tower that is projected; -1 is its last (the notes), -2 the one before
    (LLaVA). The class token, where there is one, is removed.
    image_aspect: how pictures become square: "crop", "pad" or "squash".
    image_mean, image_std, image_resample: how they are normalised, and by which filter resized ("bicubic" or
    "bilinear"); by default as the tower's family does.
    """

    model_type = "mqwen_vl"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        image_token_id=151646,
        vision_feature_layer=-1,
        image_aspect=None,
        image_mean=None,
        image_std=None,
        image_resample="bicubic",
        **kwargs,
    ):
        self.text_config = _sub_config(text_config, QWenConfig)
        self.vision_config = _sub_config(vision_config, CLIPVisionConfig)
        siglip = self.vision_config.model_type == "siglip_vision_model"
        if siglip:
            self.vision_config.vision_use_head = False  # nothing reads it, so it would get no gradient
        self.image_token_id = image_token_id
        self.vision_feature_layer = vision_feature_layer
        self.image_aspect = image_aspect or ("squash" if siglip else "crop")
        self.image_mean = list(image_mean or (SIGLIP_MEAN if siglip else CLIP_MEAN))
        self.image_std = list(image_std or (SIGLIP_STD if siglip else CLIP_STD))
        self.image_resample = image_resample
        kwargs.setdefault("tie_word_embeddings", False)  # of a language model that ties them, text_config says it
        super().__init__(**kwargs)

    @property
    def image_context_length(self) -> int:
        """Features an image gives: the patches of the square picture."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2


def _sub_config(config, default: type[PretrainedConfig]) -> PretrainedConfig:
    """A config from its dict. Qwen v1 is not among those that Transformers knows by `model_type`."""
    if isinstance(config, PretrainedConfig):
        return config
    config = dict(config or {})
    model_type = config.pop("model_type", default.model_type)
    return (default if model_type == default.model_type else CONFIG_MAPPING[model_type])(**config)
