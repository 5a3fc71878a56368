"""Pictures that have several captions each: `coco` (COCO's captions_*.json) and `aic` (AI Challenger's Chinese ones).

COCO            {"images": [{"id": 391895, "file_name": "000000391895.jpg", ...}, ...],
                 "annotations": [{"image_id": 391895, "id": 770337, "caption": "A man with ..."}, ...]}
AI Challenger   [{"url": "http://...", "image_id": "8f00f3d0f1008e08.jpg", "caption": ["...", ...]}, ...]
"""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from trainer.data.conversation import parse_conversation
from trainer.data.sources.conversations import checked_text, written
from trainer.data.sources.entries import JsonEntries, read_json
from trainer.data.sources.pictures import picture_members
from trainer.data.sources.source import (
    MALFORMED_ENTRY,
    NO_CAPTION,
    SourceRecord,
    entry_name,
    file_fingerprint,
    make_key,
    naming,
)
from trainer.errors import BadSample, DataError

AIC_PROMPTS = ("这副图像描述了什么？<image>", "<image>这幅图像中有什么？")
"""What the public notes ask for AI Challenger's captions, word for word, the picture where they put it.
(source: WatchTower-Liu/VLM-learning, dataprocess/process_image.py, which throws a coin; here entries take turns.)"""


class _CaptionsOfPictures:
    """Numbers the samples: one per picture (its first caption), or one per caption."""

    def __init__(self, counts: list[int] | None, pictures: int):
        # A picture without a caption keeps a number, under which it is reported.
        self._ends = None if counts is None else list(accumulate(max(1, count) for count in counts))
        self._pictures = pictures

    def __len__(self) -> int:
        return self._pictures if self._ends is None else (self._ends[-1] if self._ends else 0)

    def locate(self, number: int) -> tuple[int, int]:
        """(picture, caption) of a sample."""
        if self._ends is None:
            return number, 0
        picture = bisect_right(self._ends, number)
        return picture, number - (self._ends[picture - 1] if picture else 0)


class CocoSource:
    """COCO's captions. Captions of pictures that the file does not list are reported at the end, an entry a picture."""

    def __init__(self, file: Path, images: Path, all_captions: bool = False):
        self.file, self.images = file, images
        tree = read_json(file)
        if not isinstance(tree, dict) or not all(
            isinstance(tree.get(part), list) for part in ("images", "annotations")
        ):
            found = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
            raise DataError(
                f"{file}: expected COCO's captions_*.json, an object with 'images' and 'annotations', found {found}"
            )
        self.captions: dict[Any, list[str]] = {}
        for number, annotation in enumerate(tree["annotations"]):
            self._add_caption(number, annotation)
        self.pictures: list[tuple[Any, Any]] = []
        """(id, file name) of each."""
        for number, picture in enumerate(tree["images"]):
            if not isinstance(picture, dict) or not isinstance(picture.get("id"), int | str):
                raise DataError(f"{file}: images[{number}] has no 'id'; expected COCO's captions_*.json")
            self.pictures.append((picture["id"], picture.get("file_name")))
        listed = {name for name, _ in self.pictures}
        self.pictures += [(name, None) for name in self.captions if name not in listed]
        counts = [len(self.captions.get(name, ())) for name, _ in self.pictures]
        self._samples = _CaptionsOfPictures(counts if all_captions else None, len(self.pictures))

    def _add_caption(self, number: int, annotation: Any) -> None:
        good = isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str)
        if not good or not isinstance(annotation.get("caption"), str):
            found = sorted(annotation) if isinstance(annotation, dict) else type(annotation).__name__
            raise DataError(
                f"{self.file}: annotations[{number}]: expected 'image_id' and 'caption', found {found}; "
                f"captions are in COCO's captions_*.json, not in instances_*.json"
            )
        self.captions.setdefault(annotation["image_id"], []).append(annotation["caption"])

    def __len__(self) -> int:
        return len(self._samples)

    def fingerprint(self) -> dict[str, Any]:
        return file_fingerprint(self.file)

    def record(self, number: int) -> SourceRecord:
        picture, caption = self._samples.locate(number)
        name, file = self.pictures[picture]
        text = entry_name(number, name)
        with naming(f"entry {number} (image {text})"):
            if not isinstance(file, str):
                raise BadSample("has captions, but 'images' lists no file name for it", "captions without a picture")
            if name not in self.captions:
                raise BadSample(f"{file} has no caption", NO_CAPTION)
            members = {"id": text, **checked_text({"caption": self.captions[name][caption]}, 1)}
            return SourceRecord(make_key(number, text), {**picture_members(self.images, [file]), "json": members})


class AicSource:
    """AI Challenger's captions, as answers to the two prompts in turn."""

    def __init__(self, file: Path, images: Path, all_captions: bool = False):
        self.images = images
        self.entries = JsonEntries(file)
        self.fingerprint = self.entries.fingerprint
        first = self.entries[0]
        if not isinstance(first, dict) or "image_id" not in first or "caption" not in first:
            found = sorted(first) if isinstance(first, dict) else type(first).__name__
            raise DataError(f"{file}: entry 0: expected AI Challenger's fields 'image_id' and 'caption', found {found}")
        counts = [self._captions(picture) for picture in range(len(self.entries))] if all_captions else None
        self._samples = _CaptionsOfPictures(counts, len(self.entries))

    def _captions(self, picture: int) -> int:
        entry = self.entries[picture]
        captions = entry.get("caption") if isinstance(entry, dict) else None
        return len(captions) if isinstance(captions, list) else 1

    def __len__(self) -> int:
        return len(self._samples)

    def record(self, number: int) -> SourceRecord:
        picture, caption = self._samples.locate(number)
        entry = self.entries[picture]
        file = entry.get("image_id") if isinstance(entry, dict) else None
        name = entry_name(number, file)
        with naming(f"entry {number} (image {name!r})"):
            if not isinstance(file, str):
                raise BadSample("expected an object with 'image_id', a file name, and 'caption'", MALFORMED_ENTRY)
            captions = entry.get("caption")
            captions = [captions] if isinstance(captions, str) else captions
            if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
                raise BadSample("'caption' must be a list of texts", MALFORMED_ENTRY)
            if not captions:
                raise BadSample("has no caption", NO_CAPTION)
            answer = checked_text({"caption": captions[caption]}, 1)["caption"]
            prompt = AIC_PROMPTS[number % len(AIC_PROMPTS)]
            turns = parse_conversation({"caption": answer}, 1, prompt)
            members = {**picture_members(self.images, [file]), "json": {"id": name, "conversations": written(turns)}}
            return SourceRecord(make_key(number, Path(file).stem), members)
