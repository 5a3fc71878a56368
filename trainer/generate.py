"""Answers of an exported model: to prompts of any lengths and any numbers of pictures, together, or as they grow."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from trainer.config import ModelConfig
from trainer.data.conversation import place_images
from trainer.data.samples import Turn
from trainer.data.template import ChatTemplate
from trainer.data.transform import ImageTransform
from trainer.errors import ConfigError, DataError
from trainer.folders import check_export
from trainer.load import context_length, image_transform, load_trained, trained_system_prompt
from trainer.lora import base_of
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration
from trainer.tokenizer import load_tokenizer

HALF_CHARACTER = "\ufffd"
"""How a text ends whose last token is a part of a character."""


class TooLong(DataError):
    """A prompt that leaves the model no room to answer."""

    def __init__(self, tokens: int, limit: int):
        super().__init__(
            f"the prompt has {tokens} tokens, pictures included, and the model reads at most {limit}, its answer "
            f"included: shorten the text, or take fewer pictures"
        )
        self.tokens, self.limit = tokens, limit


@dataclass(frozen=True)
class Decoding:
    """How the tokens of an answer are chosen. Raises ConfigError, in the words of the command line."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token; above, tokens are drawn, the more evenly the higher it is."""
    top_p: float = 1.0
    """Drawn from the likeliest tokens that together have this share of the probability."""
    num_beams: int = 1
    """Answers that are followed side by side, of which the likeliest is taken."""
    seed: int = 0
    """Of drawing."""

    def __post_init__(self) -> None:
        for option, value in (("--max-new-tokens", self.max_new_tokens), ("--num-beams", self.num_beams)):
            if value < 1:
                raise ConfigError(f"{option} {value}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature}: must be 0 (the likeliest token) or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if self.top_p < 1 and not self.temperature:
            raise ConfigError(f"--top-p {self.top_p} chooses what is drawn from: give --temperature too, say 0.7")

    def settings(self) -> dict[str, Any]:
        """By the names of Transformers' `generate`."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.temperature:  # top_k: Transformers would draw from the likeliest 50
            found |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return found


@dataclass(frozen=True)
class Prompt:
    """A conversation up to where the model is to speak."""

    input_ids: list[int]
    pixel_values: torch.Tensor
    """(images, 3, H, W) uint8."""


class Generator:
    """An exported model, ready to answer. The code in the folder is not run: this package has its own.

    Raises CheckpointError or ConfigError where the folder is not that of an export, or has no tokenizer.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | str = "auto"):
        check_export(base_of(folder))
        transformers.utils.logging.disable_progress_bar()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(ModelConfig(init_from=str(folder)))
        self.model = load_trained(folder, dtype)
        self.model.to(self.device).eval()
        config = self.model.config
        self.transform = image_transform(config)
        self.template = ChatTemplate(self.tokenizer, config.image_token_id, config.image_context_length)
        _, self.context_length = context_length(config.text_config)
        self.system_prompt = trained_system_prompt(folder)

    def prompt(self, turns: list[Turn], images: list[bytes], system_prompt: str | None = None) -> Prompt:
        """The prompt of a conversation that ends with a question, with its encoded pictures in reading order.

        Pictures stand where the user's turns have marks, or else before the first question. system_prompt: opens a
        conversation without a system turn; None for the one of training.

        Raises BadSample where marks and pictures differ in number or a picture cannot be decoded, TooLong where the
        model could not read it all.
        """
        opening = self.system_prompt if system_prompt is None else system_prompt
        turns = place_images([Turn(turn.role, turn.text) for turn in turns], len(images))
        if opening and turns[0].role != "system":
            turns.insert(0, Turn("system", opening))
        input_ids = self.template.prompt(turns)
        if len(input_ids) >= self.context_length:
            raise TooLong(len(input_ids), self.context_length)
        size = self.transform.size
        pictures = [self.transform(image) for image in images]
        return Prompt(
            input_ids, torch.stack(pictures) if pictures else torch.empty(0, 3, size, size, dtype=torch.uint8)
        )

    def answers(self, prompts: list[Prompt], decoding: Decoding | None = None, **settings: Any) -> list[str]:
        """The answer to each, found together; but for rounding, each is what it would be alone, unless it is drawn.

        settings: further arguments of Transformers' `generate`.
        """
        decoding = decoding or Decoding()
        lengths = [len(prompt.input_ids) for prompt in prompts]
        stops = [_EndOfContext(lengths, self.context_length), *settings.pop("stopping_criteria", [])]
        torch.manual_seed(decoding.seed)
        return generate(
            self.model, self.device, self.tokenizer, self.transform, [prompt.input_ids for prompt in prompts],
            torch.cat([prompt.pixel_values for prompt in prompts]), stopping_criteria=stops,
            **decoding.settings(), **settings,
        )  # fmt: skip

    def stream(self, prompt: Prompt, decoding: Decoding | None = None) -> Iterator[str]:
        """The answer as it grows: each text begins with the one before, and the last is what `answers` gives.

        Closing the iterator ends the generation. Beams, which change their minds, cannot be streamed.
        """
        texts: queue.Queue[str | BaseException | None] = queue.Queue()
        closed = threading.Event()

        def work() -> None:
            try:
                growing, stop = _Growing(self.tokenizer, texts.put), _Closed(closed)
                texts.put(self.answers([prompt], decoding, streamer=growing, stopping_criteria=[stop])[0])
                texts.put(None)
            except BaseException as error:  # raised where the answer is awaited
                texts.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (text := texts.get()) is not None:
                if isinstance(text, BaseException):
                    raise text
                yield text
        finally:
            closed.set()
            thread.join()

    def answer(
        self, images: list[bytes], questions: list[str], system_prompt: str = "", max_new_tokens: int = 256
    ) -> list[str]:
        """Greedy answers to one question about each encoded picture."""
        prompts = [
            self.prompt([Turn("user", question)], [image], system_prompt)
            for image, question in zip(images, questions, strict=True)
        ]
        return self.answers(prompts, Decoding(max_new_tokens))


def generate(
    model: MQWenForConditionalGeneration,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    transform: ImageTransform,
    prompts: list[list[int]],
    pixel_values: torch.Tensor,
    **settings: Any,
) -> list[str]:
    """Answers to prompts of different lengths, greedy unless the settings say otherwise.

    prompts: token ids. pixel_values: (N, 3, H, W) uint8, all their pictures in reading order. settings: further
    arguments of Transformers' `generate`.
    """
    rows = [torch.tensor(prompt) for prompt in prompts]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, True, tokenizer.pad_token_id, "left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
    output = model.generate(
        input_ids.to(device), attention_mask=mask.to(device),
        pixel_values=transform.normalize(pixel_values.to(device), model.dtype), **{"do_sample": False, **settings},
    )  # fmt: skip
    new_tokens = output[:, input_ids.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


class _EndOfContext(StoppingCriteria):
    """Ends each answer where the model's context does, however long the other prompts of the batch are."""

    def __init__(self, lengths: list[int], limit: int):
        self.padding, self.limit = torch.tensor([max(lengths) - length for length in lengths]), limit

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        beams = len(input_ids) // len(self.padding)
        padding = self.padding.to(input_ids.device).repeat_interleave(beams)
        return input_ids.shape[1] - padding >= self.limit


class _Closed(StoppingCriteria):
    """Ends the answers once nobody waits for them."""

    def __init__(self, closed: threading.Event):
        self.closed = closed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return torch.full((len(input_ids),), self.closed.is_set(), device=input_ids.device)


class _Growing(BaseStreamer):
    """Hands on the text of one answer after each token that completes a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hand_on: Callable[[str], None]):
        self.tokenizer, self.hand_on = tokenizer, hand_on
        self.new_tokens: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.new_tokens is None:  # the first tokens are the prompt's
            self.new_tokens = []
            return
        self.new_tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self.new_tokens, skip_special_tokens=True)
        if not text.endswith(HALF_CHARACTER):
            self.hand_on(text.strip())

    def end(self) -> None:
        pass  # the whole answer comes from `generate`
