"""What the model answers to held-out samples while it trains: the same words on all ranks, which generate in step.

Under ZeRO-3 every token needs the weights of all ranks, so all answer the same samples; rank 0's choice of each token
is theirs, lest rounding part them and leave one waiting.
"""

from collections.abc import Callable
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed
from transformers import LogitsProcessor, StoppingCriteria

from trainer.data.loader import ShardDataset
from trainer.data.order import Slot
from trainer.data.samples import IMAGE_MARK
from trainer.dist import World, on_main_rank, sum_over_ranks
from trainer.errors import BadSample
from trainer.generate import generate
from trainer.stopping import Stopped, StopRequest


@dataclass
class Question:
    """A held-out sample up to the assistant's first words."""

    key: str
    prompt: list[int]
    """Token ids."""
    pixel_values: torch.Tensor
    """(images, 3, H, W) uint8."""
    text: str
    """The user's words."""
    expected: str
    """The assistant's."""


def questions(dataset: ShardDataset, count: int) -> list[Question]:
    """The first held-out samples, but those that cannot be used, and those longer than training's."""
    slots = (Slot(number, i) for number, shard in enumerate(dataset.reader.shards) for i in range(len(shard)))
    found = []
    for slot, _ in zip(slots, range(count), strict=False):
        try:
            turns = dataset.reader.conversation(slot)
            at = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
            marks = sum(turn.text.count(IMAGE_MARK) for turn in turns[:at] if turn.role == "user")
            prompt, size = dataset.template.prompt(turns[:at]), dataset.transform.size
            if len(prompt) > dataset.max_length:
                continue
            pictures = [dataset.transform(image) for image in dataset.reader.images(slot)[:marks]]
            found.append(Question(
                dataset.reader.key(slot), prompt,
                torch.stack(pictures) if pictures else torch.empty(0, 3, size, size, dtype=torch.uint8),
                turns[at - 1].text if at else "", turns[at].text,
            ))  # fmt: skip
        except BadSample:
            continue  # the held-out loss has named it
    return found


def held_out_answers(
    engine: deepspeed.DeepSpeedEngine,
    world: World,
    dataset: ShardDataset,
    count: int,
    max_new_tokens: int,
    stop: StopRequest,
    beat: Callable[[list[str]], None],
) -> list[tuple[Question, str]]:
    """Greedy answers to the first held-out samples, the same on all ranks. All ranks call this.

    stop: asks for an early end, by the exception Stopped. beat: is told of each token's samples.
    """
    asked = on_main_rank(world, lambda: questions(dataset, count))
    if not asked:
        return []
    in_step = _InStep(engine.device, stop, lambda: beat([question.key for question in asked]))
    engine.eval()
    try:
        answers = generate(
            engine.module, engine.device, dataset.template.tokenizer, dataset.transform,
            [question.prompt for question in asked], torch.cat([question.pixel_values for question in asked]),
            max_new_tokens=max_new_tokens, logits_processor=[_ChoiceOfRank0()], stopping_criteria=[in_step],
        )  # fmt: skip
    finally:
        engine.train()
    if in_step.stopped:
        raise Stopped
    return list(zip(asked, answers, strict=True))


class _ChoiceOfRank0(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = scores.argmax(dim=-1, keepdim=True)
        torch.distributed.broadcast(tokens, 0)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


class _InStep(StoppingCriteria):
    """After each token: says that this rank goes on, and ends all answers where any rank was asked to stop."""

    def __init__(self, device: torch.device, stop: StopRequest, beat: Callable[[], None]):
        self.device, self.stop, self.beat = device, stop, beat
        self.stopped = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        self.beat()
        self.stopped = sum_over_ranks([float(bool(self.stop))], self.device) != [0.0]
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)
