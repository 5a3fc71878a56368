"""A record of text (LLaVA's or OpenAI's conversation, or a caption) -> checked turns.

Understood are `conversations` ({"from", "value"}), `messages` ({"role", "content"}) and `caption`; of a question that
is to be answered also `prompt`.
"""

import re
from typing import Any

from trainer.data.samples import IMAGE_MARK, Turn
from trainer.errors import BadSample

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
MALFORMED = "malformed conversation"
PICTURELESS = "caption without a picture"
MISCOUNTED = "images and marks differ in number"
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def parse_conversation(record: Any, images: int, caption_prompt: str) -> list[Turn]:
    """The turns of one record that comes with so many `images`; every image has its mark in a user's turn.

    Images without any mark are put before the first question. A caption becomes the answer to `caption_prompt`.
    Raises BadSample where the record is of another form, has no answer, or holds marks for another number of images.
    """
    if not isinstance(record, dict):
        raise BadSample(f"expected a JSON object, found {type(record).__name__}", MALFORMED)
    if "conversations" in record:
        turns = _turns(record["conversations"], "conversations", "from", "value")
    elif "messages" in record:
        turns = _turns(record["messages"], "messages", "role", "content")
    elif isinstance(record.get("caption"), str):
        if not images:
            raise BadSample("a caption, but no picture", PICTURELESS)
        turns = [Turn("user", caption_prompt), Turn("assistant", record["caption"].strip())]
    else:
        raise BadSample(
            f"expected a field 'conversations' (LLaVA), 'messages' or 'caption'; the fields are {sorted(record)}",
            "no caption or conversation",
        )
    _check_characters(turns)
    if not any(turn.role == "assistant" and turn.text for turn in turns):
        raise BadSample(
            "the conversation has no answer to learn from (no turn of 'gpt' or 'assistant' with text)", "no answer"
        )
    return place_images(turns, images)


def parse_question(record: Any, images: int) -> list[Turn]:
    """The turns of one record up to its last question, which is to be answered; what follows that is left out.

    Images and marks as in `parse_conversation`. Raises BadSample where the record is of another form, asks nothing, or
    holds marks for another number of images.
    """
    if not isinstance(record, dict):
        raise BadSample(f"expected a JSON object, found {type(record).__name__}", MALFORMED)
    if isinstance(record.get("prompt"), str):
        turns = [Turn("user", record["prompt"])]
    elif "conversations" in record:
        turns = _turns(record["conversations"], "conversations", "from", "value")
    elif "messages" in record:
        turns = _turns(record["messages"], "messages", "role", "content")
    else:
        raise BadSample(
            f"expected a text 'prompt', or 'conversations' (LLaVA) or 'messages'; the fields are {sorted(record)}",
            MALFORMED,
        )
    _check_characters(turns)
    while turns and turns[-1].role != "user":
        turns.pop()
    if not turns or not turns[-1].text.strip():
        raise BadSample("there is no question to answer (no turn of 'human' or 'user' with text)", MALFORMED)
    return place_images(turns, images)


def _check_characters(turns: list[Turn]) -> None:
    for turn in turns:
        if half := _HALF_CHARACTER.search(turn.text):
            raise BadSample(
                f"half a character ({half[0]!r}, a lone surrogate) at place {half.start()} of a text", MALFORMED
            )


def _turns(entries: Any, field: str, role_field: str, text_field: str) -> list[Turn]:
    if not isinstance(entries, list) or not entries:
        raise BadSample(f"'{field}' must be a list of turns", MALFORMED)
    turns = []
    for number, entry in enumerate(entries):
        where = f"{field}[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get(text_field), str):
            raise BadSample(f"{where}: expected an object with the texts '{role_field}' and '{text_field}'", MALFORMED)
        role = entry.get(role_field)
        if not isinstance(role, str) or role not in ROLES:
            raise BadSample(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}", MALFORMED)
        turns.append(Turn(ROLES[role], entry[text_field]))
    return turns


def place_images(turns: list[Turn], images: int) -> list[Turn]:
    """The turns with a mark for each of so many images: those they have, or else all before the first question.

    Raises BadSample where they have marks for another number of images.
    """
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    if marks == 0 and images:
        question = next((turn for turn in turns if turn.role == "user"), None)
        if question is None:
            raise BadSample("the conversation has images but no question to put them in", MALFORMED)
        question.text = f"{IMAGE_MARK}\n" * images + question.text
        marks = images
    if marks != images:
        raise BadSample(f"{marks} image marks '{IMAGE_MARK}' in the questions, but {images} images", MISCOUNTED)
    return turns
