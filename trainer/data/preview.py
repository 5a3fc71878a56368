"""Samples as the model sees them: pixels after the transform, tokens grouped into whole characters.

slot -> Preview -> preview_page: HTML
"""

import io
from dataclasses import dataclass, field
from functools import cache

from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trainer.data.loader import ShardDataset
from trainer.data.order import Slot
from trainer.data.picture import decode
from trainer.data.samples import IGNORE_INDEX
from trainer.errors import BadSample


@dataclass(frozen=True)
class Piece:
    """Tokens that are shown together."""

    text: str
    kind: str
    """"text", "control" (a control token), "image" (all placeholders of one), or "bytes" (part of a character)."""
    ids: tuple[int, ...]
    supervised: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture behind the transform."""

    jpeg: bytes
    note: str
    """What it was before."""


@dataclass
class Preview:
    """One sample; what cannot be shown of it has its reason in `problems`."""

    shard: str
    key: str
    pictures: list[Picture] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    tokens: int = 0
    """That the model sees."""
    supervised: int = 0
    cut: int = 0


def pick(shard_sizes: list[int], count: int) -> list[Slot]:
    """So many samples, evenly over all of the shards, always the same."""
    slots, total = [], sum(shard_sizes)
    count = min(count, total)
    places = [i * total // count for i in range(count)]
    start = 0
    for shard, size in enumerate(shard_sizes):
        slots += [Slot(shard, place - start) for place in places if start <= place < start + size]
        start += size
    return slots


def preview(dataset: ShardDataset, slot: Slot) -> Preview:
    """A sample as a run on this data set would see it. Raises DataError for a damaged shard."""
    reader, template = dataset.reader, dataset.template
    shown = Preview(reader.shards[slot.shard].name, reader.key(slot))
    try:
        whole, labels = template.encode(reader.conversation(slot))
        shown.tokens = len(whole)
        try:
            shown.tokens = len(template.truncate(whole, labels, dataset.max_length)[0])
        except BadSample as error:
            shown.problems.append(str(error))
        shown.cut = len(whole) - shown.tokens
        # A row's first token has nothing before it to be predicted from.
        supervised = [label != IGNORE_INDEX and 0 < i < shown.tokens for i, label in enumerate(labels)]
        shown.supervised = sum(supervised)
        shown.pieces = pieces(template.tokenizer, template.image_run, whole, supervised, shown.tokens)
    except BadSample as error:
        shown.problems.append(str(error))
    for encoded in reader.images(slot):
        try:
            width, height = decode(encoded).size
            pixels = dataset.transform(encoded).permute(1, 2, 0).numpy()
        except BadSample as error:
            shown.problems.append(str(error))
            continue
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=92, subsampling=0)
        shown.pictures.append(Picture(buffer.getvalue(), f"{width} × {height}, {len(encoded) / 1024:.1f} KiB"))
    return shown


def pieces(
    tokenizer: PreTrainedTokenizerBase, image_run: list[int], ids: list[int], supervised: list[bool], kept: int
) -> list[Piece]:
    """Tokens grouped so that each piece is whole characters, all supervised or not, all cut (from `kept` on) or not."""
    found, start = [], 0
    control = set(tokenizer.get_added_vocab().values())
    while start < len(ids):
        end, state = start + 1, (supervised[start], start >= kept)
        if ids[start : start + len(image_run)] == image_run:
            end = start + len(image_run)
            text, kind = f"<image x{len(image_run)}>", "image"
        elif ids[start] in control:
            text, kind = str(tokenizer.convert_ids_to_tokens(ids[start])), "control"
        else:
            content = _bytes(tokenizer, ids[start])
            while end < len(ids) and ids[end] not in control and (supervised[end], end >= kept) == state:
                if not _goes_on(following := _bytes(tokenizer, ids[end])):
                    break
                content += following
                end += 1
            text, kind = _decoded(content)
        found.append(Piece(text, kind, tuple(ids[start:end]), *state))
        start = end
    return found


@cache
def _byte_of() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}


def _bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes:
    """Of a token of a byte-level vocabulary, which writes every byte as a character of its own; of another its text."""
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    try:
        return bytes(_byte_of()[character] for character in token)
    except KeyError:
        return token.encode()


def _goes_on(content: bytes) -> bool:
    """Whether it begins inside a character of UTF-8."""
    return content[0] & 0b1100_0000 == 0b1000_0000


def _decoded(content: bytes) -> tuple[str, str]:
    """Text and kind of a piece. Where a text is cut inside a character, neither side of it can be read."""
    try:
        return content.decode(), "text"
    except UnicodeDecodeError:
        return content.hex(" ").upper(), "bytes"
