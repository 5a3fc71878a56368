"""MQWen: Qwen that reads image features in place of a placeholder token.

`images` are features already projected to the hidden size, (N, P, D), all images of the batch in reading order. Where
they go is marked in `input_ids`, in either of two forms, which may be mixed:

    one placeholder an image      a [X] b         the sequence grows by P - 1 for each image (the original's form)
    a run of P placeholders       a [X X ... X] b  the sequence keeps its length (what the data loader makes)

Shapes: B batch, L tokens given, T tokens after growth, N images, P features an image, D hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.generation import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor

from .configuration_qwen import QWenConfig
from .linear_cross_entropy import IGNORE_INDEX
from .modeling_qwen import QWenLMHeadModel, QWenModel

REPLACE_TOKEN_ID = 151646
"""`<|extra_0|>` of Qwen's vocabulary."""

IMAGE_CONTEXT_LENGTH = 256
"""Patches of a 224-pixel image in CLIP-ViT-L/14: (224 / 14) squared."""


class ImagePlaceholder:
    """What `otherConfig` says: `replace_token_id`, `image_context_length` and `image_feature_hidden_size`.

    Takes a dict or any object with these attributes; what is missing or None gets its default (151646, 256, and the
    language model's hidden size). Raises ValueError where the features could not be embeddings of this model.
    """

    def __init__(self, config: QWenConfig, other: Any = None):
        def setting(name, default):
            value = other.get(name) if isinstance(other, dict) else getattr(other, name, None)
            return default if value is None else value

        self.replace_token_id: int = setting("replace_token_id", REPLACE_TOKEN_ID)
        self.image_context_length: int = setting("image_context_length", IMAGE_CONTEXT_LENGTH)
        self.image_feature_hidden_size: int = setting("image_feature_hidden_size", config.hidden_size)
        if self.image_feature_hidden_size != config.hidden_size:
            raise ValueError(
                f"image_feature_hidden_size={self.image_feature_hidden_size} but the language model's hidden size is "
                f"{config.hidden_size}: image features take the place of embeddings, so project them to that size."
            )


def grow_placeholders(
    input_ids: torch.Tensor,
    images: torch.Tensor,
    placeholder: ImagePlaceholder,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    padding_side: str = "right",
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Rows in either form -> rows in which every image has its run of P placeholders.

    input_ids (B, L) int64; images (N, P, D); attention_mask and labels (B, L) or already (B, T). Rows that grow
    differently are padded on `padding_side` and get an attention mask. Returns input_ids, attention_mask and labels,
    each (B, T) or None. Raises ValueError, with both counts, where images and places do not match.
    """
    count, length = images.shape[:2]
    if length != placeholder.image_context_length:
        raise ValueError(
            f"an image has {length} features, but image_context_length is {placeholder.image_context_length}"
        )
    marks = input_ids == placeholder.replace_token_id  # (B, L)
    # Every run is whole if the number of marks seen is a multiple of P wherever a run ends.
    ends = marks & ~F.pad(marks[:, 1:], (0, 1))
    broken = (ends & (marks.cumsum(-1) % length != 0)).any()
    total, broken = torch.stack((marks.sum(), broken.long())).tolist()  # one synchronisation with the device
    if total == count * length and not broken:
        return input_ids, attention_mask, labels

    repeats, places = _repeats(marks, length)
    if places != count:
        raise ValueError(
            f"{count} images for {places} places: the rows hold {total} placeholder tokens (id "
            f"{placeholder.replace_token_id}), and an image takes one, or a run of {length}."
        )
    lengths = repeats.sum(-1)
    if attention_mask is None and lengths.unique().numel() > 1:
        attention_mask = torch.ones_like(input_ids)
    if labels is not None and labels.shape[1] == input_ids.shape[1]:
        labels = labels.masked_fill(marks, IGNORE_INDEX)

    def grow(rows: torch.Tensor, fill: int) -> torch.Tensor:
        if rows.shape[1] != input_ids.shape[1]:  # already for the grown rows
            return rows
        grown = [row.repeat_interleave(r) for row, r in zip(rows, repeats, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(grown, True, fill, padding_side)

    return (
        grow(input_ids, 0),
        None if attention_mask is None else grow(attention_mask, 0),
        None if labels is None else grow(labels, IGNORE_INDEX),
    )


def _repeats(marks: torch.Tensor, length: int) -> tuple[torch.Tensor, int]:
    """How often each token of (B, L) is to be repeated, and how many images there is room for."""
    repeats, places = torch.ones_like(marks, dtype=torch.long), 0
    for row, row_marks in enumerate(marks):
        start = 0
        runs = torch.unique_consecutive(row_marks, return_counts=True)
        for is_mark, run in zip(*(x.tolist() for x in runs), strict=True):
            if is_mark and run % length == 0:
                places += run // length
            elif is_mark:
                places += run
                repeats[row, start : start + run] = length
            start += run
    return repeats, places


def embed(
    input_ids: torch.Tensor,
    images: torch.Tensor | None,
    embedding: torch.nn.Module,
    placeholder: ImagePlaceholder,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    past_key_values=None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Embeddings (B, T, D) with the features of `images` (N, P, D) in place of placeholders; attention mask and labels,
    grown with them.

    Raises ValueError, with both counts, where `images` and placeholders do not match, also when placeholders come
    without images; behind a cache (a word the model itself wrote) that is left alone.
    """
    has_past = past_key_values is not None and past_key_values.get_seq_length() > 0
    if images is None and not has_past:
        images = torch.empty(0, placeholder.image_context_length, placeholder.image_feature_hidden_size)
        images = images.to(input_ids.device)
    if images is None:
        return embedding(input_ids), attention_mask, labels
    input_ids, attention_mask, labels = grow_placeholders(input_ids, images, placeholder, attention_mask, labels)
    marks = (input_ids == placeholder.replace_token_id)[..., None]
    embeds = embedding(input_ids)
    return embeds.masked_scatter(marks, images.to(embeds)), attention_mask, labels


class MQWenModel(QWenModel):
    """`QWenModel` that reads image features."""

    def __init__(self, config: QWenConfig, otherConfig: Any = None):
        self.image_placeholder = ImagePlaceholder(config, otherConfig)
        super().__init__(config)

    def forward(
        self, input_ids=None, images=None, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        """`QWenModel.forward`, with `images` (N, P, D): features already projected to the hidden size; see `embed`."""
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds, attention_mask, _ = embed(
                input_ids, images, self.wte, self.image_placeholder, attention_mask, past_key_values=past_key_values
            )
            input_ids = None
        return super().forward(
            input_ids=input_ids, past_key_values=past_key_values, attention_mask=attention_mask,
            inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip


class GeneratesFromImages(GenerationMixin):
    """Generation of a causal language model whose `forward` takes `images` for what `image_placeholder` says."""

    image_placeholder: ImagePlaceholder

    def prepare_inputs_for_generation(
        self, input_ids, images=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        """Transformers' own, with the images where a prompt is read: at the first step, or at all without a cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if images is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            inputs["images"] = images
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Beams and several return sequences repeat rows; a row's images are repeated together, in order."""
        images = kwargs.pop("images", None)
        if images is not None and expand_size > 1:
            marks = (input_ids == self.image_placeholder.replace_token_id).sum(-1)
            per_row = images.split((marks // images.shape[1]).tolist())
            images = torch.cat([row for row in per_row for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs | ({} if images is None else {"images": images})

    @torch.no_grad()
    def generate(self, inputs=None, *args, images=None, attention_mask=None, logits_processor=None, **kwargs):
        """Transformers' `generate` with `images` (N, P, D). Rows of different lengths are padded on the left.

        Placeholders take their final length before the first step, so every step sees final lengths (which `max_length`
        counts; `max_new_tokens` does not); what is returned is the prompt as it was given, followed by the new tokens,
        none of them a placeholder.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        placeholder = self.image_placeholder
        no_placeholder = SuppressTokensLogitsProcessor([placeholder.replace_token_id], device=self.device)
        kwargs["logits_processor"] = LogitsProcessorList([no_placeholder, *(logits_processor or [])])
        if images is None or input_ids is None:
            return super().generate(input_ids, *args, attention_mask=attention_mask, **kwargs)
        grown, attention_mask, _ = grow_placeholders(
            input_ids, images, placeholder, attention_mask, padding_side="left"
        )
        if attention_mask is None:
            attention_mask = torch.ones_like(grown)
        output = super().generate(grown, *args, images=images, attention_mask=attention_mask, **kwargs)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        prompts = input_ids.repeat_interleave(sequences.shape[0] // input_ids.shape[0], dim=0)
        sequences = torch.cat((prompts, sequences[:, grown.shape[1] :]), dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output


class MQWenLMHeadModel(GeneratesFromImages, QWenLMHeadModel):
    """`QWenLMHeadModel` whose transformer reads image features.

    otherConfig: dict or object with `replace_token_id`, `image_context_length` and `image_feature_hidden_size`;
    optional, see `ImagePlaceholder`.
    """

    def __init__(self, config: QWenConfig, otherConfig: Any = None):
        self._other_config = otherConfig
        super().__init__(config)

    def _build_transformer(self, config: QWenConfig) -> MQWenModel:
        return MQWenModel(config, self._other_config)

    @property
    def image_placeholder(self) -> ImagePlaceholder:
        return self.transformer.image_placeholder

    @image_placeholder.setter
    def image_placeholder(self, placeholder: ImagePlaceholder) -> None:
        self.transformer.image_placeholder = placeholder

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        past_key_values=None,
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
        **kwargs,
    ):
        """`QWenLMHeadModel.forward` with `images`, as in `MQWenModel.forward`.

        Where the sequence grows, logits are as long as the grown rows; `labels` and `attention_mask` may have the
        given or the grown length.
        """
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds, attention_mask, labels = embed(
                input_ids, images, self.get_input_embeddings(), self.image_placeholder, attention_mask, labels,
                past_key_values,
            )  # fmt: skip
            input_ids = None
        return super().forward(
            input_ids=input_ids, past_key_values=past_key_values, attention_mask=attention_mask,
            token_type_ids=token_type_ids, position_ids=position_ids, head_mask=head_mask,
            inputs_embeds=inputs_embeds, encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask, labels=labels, use_cache=use_cache,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states,
            return_dict=return_dict, **kwargs,
        )  # fmt: skip
