"""This project's model as Transformers' LLaVA with CLIP and Qwen2: the peer that computes the same."""

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration


def as_llava(model: MQWenForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The same weights, frozen alike, in Transformers' LLaVA with CLIP and Qwen2: in training, Qwen's (v1) mathematics
    is Qwen2's with as many heads of keys as of queries."""
    text = model.config.text_config
    width = text.kv_channels * text.num_attention_heads
    qwen2 = Qwen2Config(
        vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.intermediate_size // 2,
        num_hidden_layers=text.num_hidden_layers, num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_attention_heads, head_dim=text.kv_channels, rms_norm_eps=text.layer_norm_epsilon,
        rope_theta=text.rotary_emb_base, max_position_embeddings=text.seq_length, tie_word_embeddings=False,
    )  # fmt: skip
    vision = CLIPVisionConfig(**model.config.vision_config.to_dict())
    config = LlavaConfig(
        vision_config=vision, text_config=qwen2, image_token_id=model.config.image_token_id,
        vision_feature_layer=model.config.vision_feature_layer, vision_feature_select_strategy="default",
        image_seq_length=model.config.image_context_length, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    renamed: dict[str, torch.Tensor] = {}
    trained: set[str] = set()
    for name, parameter in model.named_parameters():
        found = dict(llava_names(name, parameter.detach(), width))
        renamed |= {new: values.clone() for new, values in found.items()}  # the model itself can go
        trained |= set(found if parameter.requires_grad else ())
    missing, unexpected = llava.load_state_dict(renamed, strict=False, assign=True)
    assert not unexpected, unexpected
    assert not [name for name in missing if "position_ids" not in name], missing
    for name, parameter in llava.named_parameters():
        parameter.requires_grad_(name in trained)
    for module in llava.modules():  # what is computed and not loaded
        if hasattr(module, "inv_freq"):
            fresh = type(module)(config=qwen2)
            module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return llava


LLAVA_NAMES = {
    "language_model.lm_head.": "lm_head.", "language_model.transformer.wte.": "model.language_model.embed_tokens.",
    "language_model.transformer.h.": "model.language_model.layers.",
    "language_model.transformer.ln_f.": "model.language_model.norm.", "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}  # fmt: skip
LLAVA_LAYER = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
               "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj", "mlp.c_proj": "mlp.down_proj"}  # fmt: skip


def llava_names(name: str, values: torch.Tensor, width: int) -> list[tuple[str, torch.Tensor]]:
    """A parameter of this project's model -> those of LLaVA's that hold the same. width: of all heads together."""
    old = next(start for start in LLAVA_NAMES if name.startswith(start))
    name = LLAVA_NAMES[old] + name.removeprefix(old)
    if ".attn.c_attn." in name:
        parts = zip(("q_proj", "k_proj", "v_proj"), values.split(width), strict=True)
        return [(name.replace("attn.c_attn", f"self_attn.{part}"), of) for part, of in parts]
    if ".layers." in name and "language_model" in name:
        for own, theirs in LLAVA_LAYER.items():
            if f".{own}." in name:
                name = name.replace(f".{own}.", f".{theirs}.")
                break
    return [(name, values)]
