"""What the tests of sources share: pictures of a few pixels, and a look at what a source makes of its entries."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from trainer.data.sources.source import Source, SourceRecord
from trainer.errors import BadSample


def picture(colour: str = "red", form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, form)
    return buffer.getvalue()


def entry(name, image=None, question: str = "<image>\nWhat is it?", answer: str = "A cat.") -> dict:
    """One of LLaVA's: with `image`, a file name or several."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": turns}


def write_json(folder: Path, content, name: str = "data.json") -> Path:
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def records(source: Source) -> list[SourceRecord]:
    found = [source.record(number) for number in range(len(source))]
    # Any process may make any shard: a record depends on its number alone, not on which was read before.
    assert [source.record(number) for number in reversed(range(len(source)))] == found[::-1]
    assert len({record.key for record in found}) == len(found)
    return found


def pictures(record: SourceRecord) -> dict:
    return {extension: content for extension, content in record.members.items() if extension != "json"}


def texts(source: Source) -> list[dict]:
    return [record.members["json"] for record in records(source)]


def bad(source: Source, number: int) -> tuple[str, str]:
    """(kind, message) of a bad entry."""
    with pytest.raises(BadSample) as raised:
        source.record(number)
    return raised.value.kind, str(raised.value)


DEEP = '[{"conversations": ' + "[" * 100_000 + "]" * 100_000 + "}]"
"""Valid JSON that Python's parser does not follow to its end."""
