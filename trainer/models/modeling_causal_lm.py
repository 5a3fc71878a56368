"""Language models of Transformers that read image features, with the interface of `MQWenLMHeadModel`.

    language_model_class(config) -> MQWenLMHeadModel for Qwen v1; else Transformers' own class, extended here

Parameters keep their names (model.layers.0...), layers their code, and logits are the class's own. Added are images,
packed documents, and the loss in chunks.

Shapes: B batch, T tokens, N images, P features an image, D hidden size.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .configuration_qwen import QWenConfig
from .linear_cross_entropy import at_positions
from .modeling_mqwen import GeneratesFromImages, ImagePlaceholder, MQWenLMHeadModel, embed
from .modeling_qwen import QWenHead, check_labels, checked_positions, default_positions, next_token_loss
from .packed_attention import check_packed, packed_attention

PACKED_SDPA = "mqwen_packed_sdpa"
"""Name, for Transformers, of the attention below."""


def packed_sdpa(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, cu_seq_lens_q=None, max_length_q=None,
    **kwargs,
):  # fmt: skip
    """Transformers' SDPA; of packed documents `packed_attention`."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    window = kwargs.get("sliding_window")
    if window is not None and window < max_length_q:
        raise ValueError(f"packed documents of {max_length_q} tokens for attention in windows of {window}")
    return packed_attention(query, key, value, cu_seq_lens_q, max_length_q, scaling, dropout), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)


def language_model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class for a language model's configuration. Raises ValueError where Transformers has no causal one."""
    # Not by its class: files that travel in an export may be imported more than once.
    if config.model_type == QWenConfig.model_type:
        return MQWenLMHeadModel
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"'{config.model_type}' is no causal language model of Transformers")
    return _extended(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


@cache
def _extended(original: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Under the original's name, which goes into config.json."""
    return type(original.__name__, (CausalLMWithImages, original), {"__module__": __name__})


class CausalLMWithImages(GeneratesFromImages):
    """Goes before a causal language model of Transformers.

    otherConfig: as of `MQWenLMHeadModel`. Raises ValueError for a model whose head is not a plain linear layer.
    """

    if TYPE_CHECKING:  # of the class that comes behind
        config: Any
        training: bool
        modules: Any
        get_decoder: Any
        get_input_embeddings: Any
        get_output_embeddings: Any
        set_output_embeddings: Any

    def __init__(self, config: PretrainedConfig, otherConfig: Any = None):
        super().__init__(config)  # type: ignore[call-arg]
        self.image_placeholder = ImagePlaceholder(config, otherConfig)
        plain = self.get_output_embeddings()
        if not isinstance(plain, nn.Linear) or plain.bias is not None:
            raise ValueError(f"{type(self).__name__}: its head is {plain}, expected a linear layer without bias")
        with torch.device("meta"):
            head = QWenHead(plain.in_features, plain.out_features, bias=False)
        head.weight = plain.weight  # which may be the embedding's
        self.set_output_embeddings(head)
        if self.config._attn_implementation == "sdpa":
            self.config._attn_implementation = PACKED_SDPA

    def _apply(self, fn, recurse=True):
        """As of any module, but buffers keep their type, as when Transformers loads them: DeepSpeed would cast rotary
        frequencies to bf16, in which far positions are off by radians."""
        kept = [(module, name, buffer) for module in self.modules() for name, buffer in module._buffers.items()]
        super()._apply(fn, recurse)  # type: ignore[misc]
        for module, name, buffer in kept:
            now = module._buffers[name]
            if buffer is not None and now.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(now.device)
        return self

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_only: bool = False,
        num_items_in_batch: int | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs,
    ):
        """As `MQWenLMHeadModel.forward`: images (N, P, D), packed documents and `loss_only` included.

        Padding on either side changes nothing. Raises ValueError where images and placeholders do not match.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seq_lens_q is None
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds, attention_mask, labels = embed(
                input_ids, images, self.get_input_embeddings(), self.image_placeholder, attention_mask, labels,
                past_key_values,
            )  # fmt: skip
        if cu_seq_lens_q is not None:
            check_packed(use_cache, past_key_values, attention_mask, position_ids)
            if self.config._attn_implementation != PACKED_SDPA:
                raise ValueError("packed documents (cu_seq_lens_q) need the model loaded with its default attention")
            # A mask of four dimensions goes through Transformers as it is; SDPA would refuse its type, if an
            # architecture came by without the bounds.
            attention_mask = cu_seq_lens_q.view(1, 1, 1, -1)
            kwargs |= {"cu_seq_lens_q": cu_seq_lens_q, "max_length_q": max_length_q}
        elif position_ids is None and attention_mask is not None:
            past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = default_positions(inputs_embeds, attention_mask, past_length)
        inputs = {
            "inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids,
            "past_key_values": past_key_values, "use_cache": use_cache, **kwargs,
        }  # fmt: skip
        if loss_only:
            output = self._loss_only(inputs, labels, num_items_in_batch)
        else:
            output = super().forward(**inputs, logits_to_keep=logits_to_keep, return_dict=True)  # type: ignore[misc]
            if labels is not None:
                check_labels(labels, output.logits.shape[1])
                output.loss = next_token_loss(output.logits, labels, num_items_in_batch)
        return output if return_dict is not False else output.to_tuple()

    def _loss_only(self, inputs, labels, num_items_in_batch):
        """From the supervised positions alone, without logits."""
        positions, targets = checked_positions(labels, inputs["inputs_embeds"])
        outputs = self.get_decoder()(**inputs, return_dict=True)
        hidden_states = at_positions(outputs.last_hidden_state, positions)
        return CausalLMOutputWithPast(
            loss=self.get_output_embeddings()(hidden_states, targets, num_items_in_batch),
            past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )  # fmt: skip
