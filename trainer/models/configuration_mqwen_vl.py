"""MQWenVLConfig: vision tower, projector and language model, as one configuration."""

from transformers import CLIPVisionConfig, PretrainedConfig

from .configuration_qwen import QWenConfig


class MQWenVLConfig(PretrainedConfig):
    """Configuration of `MQWenForConditionalGeneration`.

    text_config, vision_config: a config or its dict (Qwen; CLIP's vision part).
    image_token_id: the placeholder's id. The default is Qwen's `<|extra_0|>`.
    vision_feature_layer: hidden state of the tower that is projected; -1 is its last (the notes), -2 the one before
    (LLaVA). The class token is removed.
    image_aspect: how pictures become square: "crop", "pad" or "squash".
    base_models: names of the folders that training began with, {"language_model": ..., "vision_tower": ...}.
    """

    model_type = "mqwen_vl"
    sub_configs = {"text_config": QWenConfig, "vision_config": CLIPVisionConfig}

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        image_token_id=151646,
        vision_feature_layer=-1,
        image_aspect="crop",
        base_models=None,
        **kwargs,
    ):
        if text_config is None or isinstance(text_config, dict):
            text_config = QWenConfig(**(text_config or {}))
        if vision_config is None or isinstance(vision_config, dict):
            vision_config = CLIPVisionConfig(**(vision_config or {}))
        self.text_config = text_config
        self.vision_config = vision_config
        self.image_token_id = image_token_id
        self.vision_feature_layer = vision_feature_layer
        self.image_aspect = image_aspect
        self.base_models = base_models or {}
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def image_context_length(self) -> int:
        """Features an image gives: the patches of the square picture."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2
