"""Qwen (v1): the language model, with the parameter names and the arithmetic of its official checkpoints.

    embedding -> [RMSNorm -> attention -> RMSNorm -> gated MLP] x layers -> RMSNorm -> head

Nothing here is a buffer: rotary angles and the log-n scale are computed from the positions at each call, so there is
no table that loading on the meta device or casting to bf16 could spoil.

Shapes: B batch, T tokens of this call, S tokens attended (cache included), P positions that are kept, H heads, C
channels a head, D hidden size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_qwen import QWenConfig
from .elementwise import gated, one_pass, rms_norm
from .linear_cross_entropy import at_positions, linear_cross_entropy, supervised_positions
from .packed_attention import check_packed, packed_attention
from .rotary import apply_rotary, ntk_alpha, rotary_cos_sin


class QWenRMSNorm(nn.Module):
    """`rms_norm` with its weight."""

    fused = False

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norm = one_pass(rms_norm) if self.fused and self.training else rms_norm
        return norm(hidden_states, self.weight, self.eps)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Attention in plain PyTorch; the interface of Transformers' `ALL_ATTENTION_FUNCTIONS`."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(query)
    probabilities = F.dropout(probabilities, dropout, module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class QWenAttention(nn.Module):
    """Multi-head attention with one fused projection (with bias) for query, key and value."""

    is_causal = True
    fused = False

    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        projection_size = config.kv_channels * config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * projection_size)
        self.c_proj = nn.Linear(projection_size, config.hidden_size, bias=not config.no_bias)

    def forward(
        self, hidden_states, rotary, logn_scale, attention_mask=None, past_key_values=None,
        cu_seq_lens_q=None, max_length_q=None, kept=None, **kwargs,
    ):  # fmt: skip
        batch, length = hidden_states.shape[:2]
        qkv = self.c_attn(hidden_states).view(batch, length, 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C)
        rotate = one_pass(apply_rotary) if self.fused and self.training else apply_rotary
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if logn_scale is not None:
            query = query * logn_scale.type_as(query)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        dropout = self.config.attn_dropout_prob if self.training else 0.0
        if cu_seq_lens_q is not None:
            weights = None
            output = packed_attention(query, key, value, cu_seq_lens_q, max_length_q, self.scaling, dropout)
        else:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
            output, weights = attention(
                self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
            )
        output = output.reshape(batch, length, -1)
        return self.c_proj(output if kept is None else at_positions(output, kept)), weights


class QWenMLP(nn.Module):
    """Gated MLP: c_proj(w1(x) * silu(w2(x)))."""

    fused = False

    def __init__(self, config: QWenConfig):
        super().__init__()
        width, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, width, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = one_pass(gated) if self.fused and self.training else gated
        return self.c_proj(gate(self.w1(hidden_states), self.w2(hidden_states)))


class QWenBlock(GradientCheckpointingLayer):
    """Pre-norm transformer layer. kept (P,): positions of the flattened batch that anyone reads; behind the attention
    only these are computed, and it returns (1, P, D)."""

    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states, kept=None, **kwargs):
        attention, weights = self.attn(self.ln_1(hidden_states), kept=kept, **kwargs)
        if kept is not None:
            hidden_states = at_positions(hidden_states, kept)
        hidden_states = hidden_states + attention
        return hidden_states + self.mlp(self.ln_2(hidden_states)), weights


class QWenPreTrainedModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # Tables that some published checkpoints carry; here they are computed.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"attn\.masked_bias"]

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, QWenRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, QWenBlock):
            # The two projections that write into the residual stream start smaller, by the number of such writes.
            for projection in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(projection.weight, mean=0.0, std=std / math.sqrt(2 * self.config.num_hidden_layers))


class QWenModel(QWenPreTrainedModel):
    """The transformer without its head."""

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.ModuleList(QWenBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        kept: torch.Tensor | None = None,
        **kwargs,
    ):
        """input_ids (B, T) int64 or inputs_embeds (B, T, D); attention_mask (B, S), 1 where attended.

        cu_seq_lens_q (documents + 1,) int32 and max_length_q, the longest: a single row (B = 1) holds so many packed
        documents, with `position_ids` that start anew in each; attention stays inside them.

        kept (P,) int64: positions of the flattened batch (B·T) whose last hidden states are wanted, which are then
        (1, P, D): what comes behind the last attention is computed there alone.

        `token_type_ids` has no meaning for Qwen and is ignored. Raises ValueError for `head_mask` and encoder states,
        which this decoder cannot honour. Returns the last hidden states (B, T, D) and, if asked, the cache, all
        hidden states (with `kept` the last of them is shorter) and all attention weights.
        """
        if head_mask is not None or encoder_hidden_states is not None or encoder_attention_mask is not None:
            raise ValueError("Qwen has neither head masks nor cross-attention: leave head_mask and encoder_* out.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError("output_attentions needs the model loaded with attn_implementation='eager'.")
        packed = cu_seq_lens_q is not None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not packed
        if packed:
            check_packed(use_cache, past_key_values, attention_mask, position_ids)

        hidden_states = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = default_positions(hidden_states, attention_mask, past_length)
        context = past_length + hidden_states.shape[1] if max_length_q is None else max_length_q
        alpha = self._ntk_alpha(hidden_states, attention_mask, past_key_values, past_length, context)
        layer_inputs = {
            "rotary": rotary_cos_sin(position_ids, self.config, alpha),
            "logn_scale": self._logn_scale(position_ids, context),
            "attention_mask": None if packed else create_causal_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask,
                past_key_values=past_key_values, position_ids=position_ids,
            ),
            "past_key_values": past_key_values,
            "cu_seq_lens_q": cu_seq_lens_q,
            "max_length_q": max_length_q,
        }  # fmt: skip

        hidden_states = self.drop(hidden_states)
        all_hidden_states, all_attentions = [], []
        for block in self.h:
            all_hidden_states.append(hidden_states)
            is_last = block is self.h[-1]
            hidden_states, attentions = block(hidden_states, kept=kept if is_last else None, **layer_inputs, **kwargs)
            all_attentions.append(attentions)
            if not output_hidden_states:
                all_hidden_states.clear()
        hidden_states = self.ln_f(hidden_states)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def _ntk_alpha(self, hidden_states, attention_mask, past_key_values, past_length, length) -> torch.Tensor:
        """(B, 1) or (1, 1): set when a prompt is read, and kept with its cache, since cached keys are rotated by it."""
        if past_length and (alpha := getattr(past_key_values, "ntk_alpha", None)) is not None:
            return alpha
        lengths = [length]
        if attention_mask is not None and attention_mask.ndim == 2 and length > self.config.seq_length:
            lengths = attention_mask.sum(-1).tolist()
        stretch = self.config.use_dynamic_ntk and not self.training
        alpha = [[ntk_alpha(n, self.config.seq_length) if stretch else 1.0] for n in lengths]
        alpha = torch.tensor(alpha, device=hidden_states.device)
        if past_key_values is not None:
            past_key_values.ntk_alpha = alpha
        return alpha

    def _logn_scale(self, position_ids, length: int) -> torch.Tensor | None:
        """(B, 1, T, 1): log of the context so far to the base `seq_length`, at least 1; None if it is 1 everywhere."""
        if self.training or not self.config.use_logn_attn or length <= self.config.seq_length:
            return None
        scale = (position_ids + 1).float().log() / math.log(self.config.seq_length)
        return scale.clamp(min=1.0)[:, None, :, None]


def default_positions(hidden_states, attention_mask, past_length: int) -> torch.Tensor:
    """Positions (B, T): those of the attended tokens count, so padding on either side changes nothing."""
    length = hidden_states.shape[1]
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(past_length, past_length + length, device=hidden_states.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


class QWenHead(nn.Linear):
    """Projection onto the vocabulary. Given targets (P,) of hidden states (1, P, D) it returns the loss and makes no
    logits; that happens inside this module's forward because ZeRO-3 gathers a weight only while its module runs."""

    def forward(self, hidden_states, targets=None, num_items=None):
        hidden_states = hidden_states.to(self.weight.dtype)  # config.bf16 casts the transformer alone
        if targets is None:
            return super().forward(hidden_states)
        return linear_cross_entropy(hidden_states, self.weight, targets, num_items)


def check_labels(labels: torch.Tensor, length: int) -> None:
    """Raises ValueError where labels (B, T) are for another number of positions."""
    if labels.shape[1] != length:
        raise ValueError(f"labels of {labels.shape[1]} positions for logits of {length}")


def checked_positions(labels: torch.Tensor | None, given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`supervised_positions` of labels for what a model is given, ids or embeddings (B, T, ...). Raises ValueError
    where either is missing, or the labels are for another number of positions."""
    if labels is None or given is None:
        raise ValueError("loss_only needs labels, and input_ids or inputs_embeds")
    check_labels(labels, given.shape[1])
    return supervised_positions(labels)


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor, num_items: int | None = None) -> torch.Tensor:
    """Mean cross-entropy of logits (B, T, V) against labels (B, T), or their sum over `num_items`."""
    predictions, targets = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(logits.device)
    if num_items is None:
        return F.cross_entropy(predictions, targets)
    return F.cross_entropy(predictions, targets, reduction="sum") / num_items


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    """Qwen with its language-model head (not tied to the embedding)."""

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.transformer = self._build_transformer(config)
        self.lm_head = QWenHead(config.hidden_size, config.vocab_size, bias=False)
        if config.bf16:
            self.transformer.bfloat16()
        if config.fp16:
            self.transformer.half()
        self.post_init()

    def _build_transformer(self, config: QWenConfig) -> QWenModel:
        return QWenModel(config)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_only: bool = False,
        num_items_in_batch: int | None = None,
        **kwargs,
    ):
        """As `QWenModel.forward`, with the head.

        labels (B, T): next-token targets, -100 where nothing is supervised; the loss is their mean cross-entropy, or
        their sum over `num_items_in_batch`. `loss_only` computes it, and what comes after the last attention, at the
        supervised positions alone and returns no logits. `logits_to_keep`: only the last so many positions (0: all),
        or the positions of an index tensor.
        Returns `CausalLMOutputWithPast`, or a tuple with `return_dict=False`.
        """
        kept = targets = None
        if loss_only:
            kept, targets = checked_positions(labels, input_ids if inputs_embeds is None else inputs_embeds)
        outputs = self.transformer(
            input_ids=input_ids, past_key_values=past_key_values, attention_mask=attention_mask,
            token_type_ids=token_type_ids, position_ids=position_ids, head_mask=head_mask,
            inputs_embeds=inputs_embeds, encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask, use_cache=use_cache, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states, return_dict=True, kept=kept, **kwargs,
        )  # fmt: skip
        hidden_states, loss, logits = outputs.last_hidden_state, None, None
        if loss_only:
            loss = self.lm_head(hidden_states, targets, num_items_in_batch)
        else:
            wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, wanted])
            if labels is not None:
                check_labels(labels, logits.shape[1])
                loss = next_token_loss(logits, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states, attentions=outputs.attentions,
        )  # fmt: skip
        return output if return_dict is not False else output.to_tuple()
