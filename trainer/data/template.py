"""Conversation -> token ids and labels, in ChatML.

    <|im_start|>role\\n text <|im_end|>\\n          for every turn

Supervised are the assistant's words and the <|im_end|> that ends them. Ids are built piece by piece, so what is
supervised is known from the construction and never guessed from the text. Text is text: a caption that spells
"<|im_start|>" is encoded as those letters. Each image mark becomes a run of placeholders as long as its features.
"""

import hashlib
from functools import cached_property, lru_cache

from transformers import PreTrainedTokenizerBase

from trainer.data.samples import IGNORE_INDEX, IMAGE_MARK, Turn
from trainer.errors import BadSample, DataError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"


class ChatTemplate:
    """Encodes conversations with one tokenizer; every image takes `image_length` tokens.

    image_token_id: the placeholder's id. Raises DataError if the tokenizer lacks ChatML's control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, image_length: int):
        self.tokenizer = tokenizer
        self.image_run = [image_token_id] * image_length
        vocabulary = tokenizer.get_vocab()
        if IM_START not in vocabulary or IM_END not in vocabulary:
            raise DataError(f"the tokenizer has no {IM_START} and {IM_END}: ChatML needs them as control tokens.")
        self.im_start, self.im_end = vocabulary[IM_START], vocabulary[IM_END]
        # Roles, line ends, system prompts and set questions come again and again, and a call costs 0.1 ms.
        self._remembered = lru_cache(maxsize=1024)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        )
        self.newline = self._text("\n")

    @cached_property
    def fingerprint(self) -> str:
        """Of all that the ids of a text depend on: two templates with the same one encode alike."""
        tokenizer = self.tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
        return hashlib.sha256(f"ChatML {len(self.image_run)} {tokenizer}".encode()).hexdigest()[:12]

    def _text(self, text: str) -> list[int]:
        return list(self._remembered(text))

    def _content(self, text: str) -> list[int]:
        first, *rest = text.split(IMAGE_MARK)
        ids = self._text(first)
        for piece in rest:
            ids += self.image_run + self._text(piece)
        return ids

    def prompt(self, conversation: list[Turn]) -> list[int]:
        """Ids of a conversation up to where the assistant is to speak."""
        ids = [i for turn in conversation for i in self._turn(turn)[0]]
        return ids + [self.im_start, *self._text("assistant"), *self.newline]

    def _turn(self, turn: Turn) -> tuple[list[int], list[int]]:
        head = [self.im_start, *self._text(turn.role), *self.newline]
        # Images stand in the user's turns; elsewhere the mark is text like any other.
        content = self._content(turn.text) if turn.role == "user" else self._text(turn.text)
        body = [*content, self.im_end]
        labels = body if turn.role == "assistant" else [IGNORE_INDEX] * len(body)
        labels = [IGNORE_INDEX] * len(head) + labels + [IGNORE_INDEX] * len(self.newline)
        return head + body + self.newline, labels

    def encode(self, conversation: list[Turn]) -> tuple[list[int], list[int]]:
        """(input_ids, labels), equally long, untruncated."""
        input_ids: list[int] = []
        labels: list[int] = []
        for turn in conversation:
            turn_ids, turn_labels = self._turn(turn)
            input_ids += turn_ids
            labels += turn_labels
        return input_ids, labels

    def truncate(self, input_ids: list[int], labels: list[int], max_length: int) -> tuple[list[int], list[int]]:
        """Cuts at the end, never inside or before an image's run: the features of an image go in whole.

        Raises BadSample where the images alone do not fit, or where nothing supervised would be left.
        """
        if len(input_ids) > max_length:
            image_id = self.image_run[0]
            end_of_images = len(input_ids) - input_ids[::-1].index(image_id) if image_id in input_ids else 0
            if end_of_images > max_length:
                raise BadSample(
                    f"its images reach to token {end_of_images}, beyond data.max_length={max_length}, and an image is "
                    f"never cut: raise data.max_length or leave the sample out",
                    "images longer than max_length",
                )
            input_ids, labels = input_ids[:max_length], labels[:max_length]
        if all(label == IGNORE_INDEX for label in labels[1:]):
            raise BadSample("no token of an answer is left to supervise", "nothing supervised")
        return input_ids, labels
