"""MQWenForConditionalGeneration: pictures and text in, text out.

    pixel_values -> vision_tower -> patch features -> multi_modal_projector -> language_model (MQWenLMHeadModel)

Tower and language model are what their configurations say: CLIP or SigLIP; Qwen v1 or a newer one of Transformers.

Shapes: N images, P patches, V width of the tower, D hidden size of the language model, B batch, T tokens.
"""

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel, PreTrainedModel, SiglipVisionModel
from transformers.generation import GenerationMixin

from .configuration_mqwen_vl import MQWenVLConfig
from .modeling_causal_lm import language_model_class

PROJECTOR_INIT_STD = 0.01
"""Standard deviation of the projector's initial weights; its biases start at zero. (source: the notes)"""

TOWERS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
"""Class of a tower by its `model_type`."""


def norms_before(tower: Any) -> list[nn.Module]:
    """CLIP's norm between embedding and layers; SigLIP has none."""
    return [tower.pre_layrnorm] if hasattr(tower, "pre_layrnorm") else []


class MultiModalProjector(nn.Module):
    """Linear - GELU - Linear, from the tower's width to the language model's hidden size."""

    def __init__(self, vision_size: int, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Initialises in fp32 from its own generator: the same seed, the same weights, whatever ran before."""
        generator = torch.Generator().manual_seed(seed)
        for linear in (self.linear_1, self.linear_2):
            weight = torch.empty(linear.weight.shape).normal_(0.0, PROJECTOR_INIT_STD, generator=generator)
            linear.weight.copy_(weight)
            linear.bias.zero_()


class MQWenForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = MQWenVLConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    def __init__(self, config: MQWenVLConfig):
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        placeholder = {"replace_token_id": config.image_token_id, "image_context_length": config.image_context_length}
        self.vision_tower = TOWERS[vision.model_type](vision)
        self.multi_modal_projector = MultiModalProjector(vision.hidden_size, text.hidden_size)
        self.language_model = language_model_class(text)(text, placeholder)
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        vision_tower: PreTrainedModel,
        language_model: PreTrainedModel,
        seed: int = 0,
        **settings,
    ) -> "MQWenForConditionalGeneration":
        """Joins two loaded models by a new projector, initialised from `seed`, in the language model's dtype.

        settings: further fields of `MQWenVLConfig`. The placeholder is `settings["image_token_id"]`.
        """
        config = MQWenVLConfig(language_model.config, vision_tower.config, **settings)
        with torch.device("meta"):
            model = cls(config)
        language_model.image_placeholder = model.language_model.image_placeholder
        model.vision_tower, model.language_model = vision_tower, language_model
        model.generation_config = language_model.generation_config
        model.multi_modal_projector.to_empty(device="cpu").to(language_model.dtype).reset_parameters(seed)
        config.dtype = language_model.dtype
        return model

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MultiModalProjector):
            for linear in (module.linear_1, module.linear_2):
                nn.init.normal_(linear.weight, std=PROJECTOR_INIT_STD)
                nn.init.zeros_(linear.bias)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) floats as the tower's processor normalises them -> (N, P, D) features for the language model."""
        # A frozen tower keeps no graph, whatever the projector behind it needs.
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(trains):
            patches = self._hidden_states(pixel_values)
        patches = patches[:, -self.config.image_context_length :]  # without the class token, which comes first
        return self.multi_modal_projector(patches.to(self.multi_modal_projector.linear_1.weight.dtype))

    def _hidden_states(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, positions, V) of the tower, at `vision_feature_layer`."""
        # Layer by layer, for the tower itself would run them all. The last hidden state is what it returns, though:
        # SigLIP's norm is in it.
        tower = self.vision_tower
        if self.config.vision_feature_layer == -1:
            return tower(pixel_values).last_hidden_state
        hidden_states = tower.embeddings(pixel_values)
        for norm in norms_before(tower):
            hidden_states = norm(hidden_states)
        for layer in tower.encoder.layers[: self.config.vision_layers_read]:
            hidden_states = layer(hidden_states, attention_mask=None)
        return hidden_states

    def unread_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the tower that no feature depends on, by name: of the layers behind the one that is read, and
        of a norm behind them."""
        config = self.config
        unread = {
            f"encoder.layers.{i}." for i in range(config.vision_layers_read, config.vision_config.num_hidden_layers)
        }
        if config.vision_config.model_type == "clip_vision_model" or config.vision_feature_layer != -1:
            unread.add("post_layernorm.")  # CLIP's is for its class token alone
        named = self.vision_tower.named_parameters()
        return {f"vision_tower.{name}": p for name, p in named if name.startswith(tuple(unread))}

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ):
        """`MQWenLMHeadModel.forward` on pictures.

        input_ids (B, T) int64 with placeholders; pixel_values (N, 3, H, W), all pictures of the batch in reading
        order, N = 0 for a batch of text. Returns `CausalLMOutputWithPast`.
        """
        images, unused = None, None
        if pixel_values is None and self.training:
            size = self.config.vision_config.image_size
            pixel_values = torch.empty(0, 3, size, size, device=self.device)
        if pixel_values is not None:
            blank = pixel_values.shape[0] == 0
            # Every rank runs tower and projector at every step, on a blank picture if it has none: under ZeRO-3 a rank
            # that skips them leaves the others waiting in the gather, under ZeRO-2 in the reduction.
            if blank:
                pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
            images = self.get_image_features(pixel_values)
            if blank:
                images, unused = images[:0], images.float().sum() * 0.0
        output = self.language_model(
            input_ids=input_ids, images=images, past_key_values=past_key_values, attention_mask=attention_mask,
            labels=labels, return_dict=True, **kwargs,
        )  # fmt: skip
        if labels is not None and unused is not None:
            output.loss = output.loss + unused
        return output if return_dict is not False else output.to_tuple()

    @torch.no_grad()
    def generate(self, inputs=None, *args, pixel_values=None, **kwargs):
        """Transformers' `generate` with pictures (N, 3, H, W); see `MQWenLMHeadModel.generate`."""
        images = None if pixel_values is None or not len(pixel_values) else self.get_image_features(pixel_values)
        self.language_model.generation_config = self.generation_config
        return self.language_model.generate(inputs, *args, images=images, **kwargs)
