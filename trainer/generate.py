"""Answers of an exported model."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainer.data.samples import IMAGE_MARK, Turn
from trainer.data.template import ChatTemplate
from trainer.data.transform import ImageTransform
from trainer.load import image_transform, load_trained
from trainer.models.modeling_mqwen_vl import MQWenForConditionalGeneration


class Generator:
    """An exported model, ready to answer. The code in the folder is not run: this package has its own."""

    def __init__(self, folder: Path, dtype: torch.dtype | str = "auto"):
        transformers.utils.logging.disable_progress_bar()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.model = load_trained(folder, dtype)
        self.model.to(self.device).eval()
        config = self.model.config
        self.transform = image_transform(config)
        self.template = ChatTemplate(self.tokenizer, config.image_token_id, config.image_context_length)

    def answer(
        self, images: list[bytes], questions: list[str], system_prompt: str = "", max_new_tokens: int = 256
    ) -> list[str]:
        """Greedy answers to one question about each encoded picture."""
        prompts = []
        for question in questions:
            turns = [Turn("user", question if IMAGE_MARK in question else f"{IMAGE_MARK}\n{question}")]
            if system_prompt:
                turns.insert(0, Turn("system", system_prompt))
            prompts.append(self.template.prompt(turns))
        pixels = torch.stack([self.transform(image) for image in images])
        return generate(
            self.model, self.device, self.tokenizer, self.transform, prompts, pixels, max_new_tokens=max_new_tokens
        )


def generate(
    model: MQWenForConditionalGeneration,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    transform: ImageTransform,
    prompts: list[list[int]],
    pixel_values: torch.Tensor,
    **settings: Any,
) -> list[str]:
    """Greedy answers to prompts of different lengths.

    prompts: token ids. pixel_values: (N, 3, H, W) uint8, all their pictures in reading order. settings: further
    arguments of Transformers' `generate`.
    """
    rows = [torch.tensor(prompt) for prompt in prompts]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, True, tokenizer.pad_token_id, "left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
    output = model.generate(
        input_ids.to(device), attention_mask=mask.to(device), do_sample=False,
        pixel_values=transform.normalize(pixel_values.to(device), model.dtype), **settings,
    )  # fmt: skip
    new_tokens = output[:, input_ids.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
