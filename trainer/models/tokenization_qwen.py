"""Qwen's tokenizer as a fast tokenizer, built from `qwen.tiktoken` without remote code.

The file holds one byte-level BPE token per line: base64 of its bytes, a space, its rank. Control tokens follow the
ranks: <|endoftext|>, <|im_start|>, <|im_end|>, <|extra_0|> ... <|extra_204|>.
"""

import base64
import binascii
from pathlib import Path

from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from .processing_mqwen_vl import chat_template

VOCABULARY_FILE = "qwen.tiktoken"

# Letters, single digits, punctuation and white space are never merged across. (source: Qwen v1's tokenizer)
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE_PLACEHOLDER = "<|extra_0|>"
CONTROL_TOKENS = [END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205))]


class _QWenConverter(TikTokenConverter):
    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        ranks = {}
        for number, line in enumerate(Path(tiktoken_url).read_bytes().splitlines(), start=1):
            if not line:
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise ValueError(
                    f"{tiktoken_url}, line {number}: expected 'BASE64 RANK', found {line[:60]!r}"
                ) from error
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"{tiktoken_url}: the ranks are not 0 to {len(ranks) - 1}, each once")
        return ranks


def write_tiktoken(vocabulary: dict[str, int], file: Path) -> None:
    """Writes the tokens of a byte-level BPE, by rank and without control tokens, as such a file."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    ranked = sorted(vocabulary.items(), key=lambda item: item[1])
    lines = [base64.b64encode(bytes(byte_of[c] for c in token)).decode() + f" {rank}\n" for token, rank in ranked]
    file.write_text("".join(lines))


def build_tokenizer(vocabulary_file: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a `qwen.tiktoken`; `<|endoftext|>` pads, ChatML is the chat template.

    Raises ValueError, naming the line, where the file is not in tiktoken's format.
    """
    converter = _QWenConverter(
        vocab_file=str(vocabulary_file), pattern=SPLIT_PATTERN, extra_special_tokens=CONTROL_TOKENS
    )
    backend = converter.converted()
    backend.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START, IM_END, IMAGE_PLACEHOLDER],
        chat_template=chat_template(IMAGE_PLACEHOLDER),
        clean_up_tokenization_spaces=False,
    )
