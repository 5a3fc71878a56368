"""The tokenizer that a configuration names, made ready for pictures and ChatML."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.folders import find_export
from trainer.models.processing_mqwen_vl import chat_template
from trainer.models.tokenization_qwen import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE_PLACEHOLDER,
    VOCABULARY_FILE,
    build_tokenizer,
)

IMAGE_PAD = "<|image_pad|>"
"""The placeholder of Qwen2.5 and Qwen3; Qwen2 gets it as a token of its own."""


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.tokenizer`, or else of the model that training starts from; no remote code.

    One without a placeholder for pictures gets `<|image_pad|>`; one that does not pad, `<|endoftext|>` for it; one that
    is not Qwen v1's, the chat template that training follows. Raises ConfigError if the folder has none, or one
    without the control tokens.
    """
    folder = Path(model.tokenizer or model.language_model or find_export(Path(model.init_from or "")))
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder, where a tokenizer was expected")
    if (folder / VOCABULARY_FILE).is_file():
        try:
            return build_tokenizer(folder / VOCABULARY_FILE)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder}: no {VOCABULARY_FILE} and no tokenizer.json; name their folder in model.tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if missing := {END_OF_TEXT, IM_START, IM_END} - tokenizer.get_vocab().keys():
        raise ConfigError(f"{folder}: the tokenizer lacks the control tokens {', '.join(sorted(missing))}")
    if placeholder_of(tokenizer) not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_PAD], special_tokens=True)
    if placeholder_of(tokenizer) != IMAGE_PLACEHOLDER:
        # Qwen2's own writes a system prompt of its own before every conversation, and knows no pictures.
        tokenizer.chat_template = chat_template(IMAGE_PAD)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = END_OF_TEXT
    return tokenizer


def placeholder_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that stands for a picture: Qwen v1's, or else `<|image_pad|>`."""
    return IMAGE_PLACEHOLDER if IMAGE_PLACEHOLDER in tokenizer.get_vocab() else IMAGE_PAD


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that stands for a picture."""
    return tokenizer.get_vocab()[placeholder_of(tokenizer)]
