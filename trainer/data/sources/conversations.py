"""`llava`: LLaVA's and ShareGPT's JSON (several pictures, several turns, text alone), as a list or a line each.
`jsonl`: the same files with any text the trainer knows: `conversations`, `messages`, `caption` or `text`.

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A bus."}]}
"""

from pathlib import Path
from typing import Any

from trainer.data.conversation import ROLES, parse_conversation
from trainer.data.samples import Turn
from trainer.data.sources.entries import JsonEntries
from trainer.data.sources.pictures import picture_members
from trainer.data.sources.source import (
    MALFORMED_ENTRY,
    NO_CAPTION,
    SourceRecord,
    entry_name,
    make_key,
    naming,
)
from trainer.errors import BadSample, DataError

_SPEAKERS = {role: name for name, role in ROLES.items() if name in ("human", "gpt", "system")}


class ConversationSource:
    """Entries of `file`, pictures taken from the folder `images`.

    any_text: takes `messages`, `caption` and `text` as well as LLaVA's `conversations`.
    Raises DataError if the file is of another form; single entries are checked by `record`.
    """

    def __init__(self, file: Path, images: Path, any_text: bool = False):
        self.entries = JsonEntries(file)
        self.images = images
        self.any_text = any_text
        self.fingerprint = self.entries.fingerprint
        if not any(self._has_text(number) for number in range(len(self))):
            raise DataError(f"{file}: {self._first_problem()}")

    def __len__(self) -> int:
        return len(self.entries)

    def record(self, number: int) -> SourceRecord:
        entry = self.entries[number]
        name = entry_name(number, entry.get("id", number) if isinstance(entry, dict) else number)
        with naming(f"entry {number} (id {name!r})"):
            if not isinstance(entry, dict) or not self._fields(entry):
                raise BadSample(self._expected(entry), MALFORMED_ENTRY)
            files = _picture_names(entry)
            text = checked_text({field: entry[field] for field in self._fields(entry)}, len(files))
            return SourceRecord(
                make_key(number, name), {**picture_members(self.images, files), "json": {"id": name, **text}}
            )

    def _has_text(self, number: int) -> bool:
        try:
            entry = self.entries[number]
        except BadSample:
            return False
        return isinstance(entry, dict) and bool(self._fields(entry))

    def _first_problem(self) -> str:
        try:
            return f"entry 0: {self._expected(self.entries[0])}"
        except BadSample as error:
            return str(error)

    def _fields(self, entry: dict) -> list[str]:
        """The fields of an entry that hold its text."""
        if not self.any_text:
            return ["conversations"] if isinstance(entry.get("conversations"), list) else []
        return [field for field in ("conversations", "messages", "caption", "text") if entry.get(field) is not None]

    def _expected(self, entry: Any) -> str:
        fields = "one of 'conversations', 'messages', 'caption' and 'text'" if self.any_text else "'conversations'"
        layout = "the fields" if self.any_text else "LLaVA's fields"
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        return f"expected {layout} {fields} and 'image', found {found}"


def checked_text(fields: dict[str, Any], pictures: int) -> dict[str, Any]:
    """The text of a sample as shards hold it: {"caption": ...}, or {"conversations": [...]} with a mark per picture.

    A caption stays one, so that the training configuration says which question it answers. Raises BadSample.
    """
    if "conversations" in fields or "messages" in fields:
        return {"conversations": written(parse_conversation(fields, pictures, caption_prompt=""))}
    caption = fields.get("caption", fields.get("text"))
    if not isinstance(caption, str):
        raise BadSample(f"the caption must be a text, found {type(caption).__name__}", NO_CAPTION)
    if not caption.strip():
        raise BadSample("the caption is empty", NO_CAPTION)
    parse_conversation({"caption": caption}, pictures, caption_prompt="")
    return {"caption": caption.strip()}


def written(turns: list[Turn]) -> list[dict[str, str]]:
    """Checked turns in LLaVA's form."""
    return [{"from": _SPEAKERS[turn.role], "value": turn.text} for turn in turns]


def _picture_names(entry: dict) -> list[str]:
    field = "images" if entry.get("images") and not entry.get("image") else "image"
    files = entry.get(field) or []
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise BadSample(f"'{field}' must be a file name or a list of file names", MALFORMED_ENTRY)
    return files
