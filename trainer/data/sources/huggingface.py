"""`hf`: what `datasets.load_dataset` opens (of the hub, a folder of pictures, parquet) or `save_to_disk` has written.

Pictures are taken as they are stored, without decoding and encoding them again.
"""

import os
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Image, List

from trainer.data.sources.conversations import checked_text
from trainer.data.sources.pictures import NO_PICTURE, OUTSIDE, UNREADABLE, bytes_as_picture, picture_extension
from trainer.data.sources.source import (
    MALFORMED_ENTRY,
    NO_CAPTION,
    SourceRecord,
    make_key,
    naming,
)
from trainer.errors import BadSample, DataError

CONVERSATION_COLUMNS = ("conversations", "messages")
CAPTION_COLUMNS = ("caption", "captions", "text")


class HuggingFaceSource:
    """Rows of one split.

    source: a name on the hub, a folder or a file. The columns are found where that is not ambiguous; a column with a
    list of captions (Flickr30k) gives the first.
    """

    def __init__(
        self,
        source: str,
        split: str = "train",
        config_name: str | None = None,
        image_column: str | None = None,
        text_column: str | None = None,
        conversations_column: str | None = None,
    ):
        self.source = source
        dataset = _load(source, split, config_name)
        self._identity = _identity(dataset)
        self.image_column = image_column or _find_images(source, dataset)
        self.text_column = conversations_column or text_column or _find_text(source, dataset)
        self.is_caption = not conversations_column and (
            bool(text_column) or self.text_column not in CONVERSATION_COLUMNS
        )
        for column in (self.image_column, self.text_column):
            if column not in dataset.column_names:
                raise DataError(f"{source}: no column {column!r}; {_columns(dataset)}")
        feature = dataset.features[self.image_column]
        if not _holds_pictures(feature) and not _may_hold_pictures(feature):
            raise DataError(f"{source}: column {self.image_column!r} does not hold pictures; {_columns(dataset)}")
        images: Any = List(Image(decode=False)) if isinstance(feature, List) else Image(decode=False)
        self.rows = dataset.select_columns([self.image_column, self.text_column]).cast_column(self.image_column, images)
        caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
        self._folders = [str(folder) for folder in (source, *caches, datasets.config.HF_CACHE_HOME)]

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> dict[str, Any]:
        return self._identity

    def record(self, number: int) -> SourceRecord:
        with naming(f"row {number}"):
            row = self.rows[number]
            cells = row[self.image_column]
            cells = cells if isinstance(cells, list) else [] if cells is None else [cells]
            text = checked_text(self._text(row[self.text_column]), len(cells))
            members: dict[str, bytes | str | dict] = {}
            for position, cell in enumerate(cells):
                extension, content = bytes_as_picture(self._bytes(cell), f"picture {position}")
                members[picture_extension(position, len(cells), extension)] = content
            return SourceRecord(make_key(number), {**members, "json": {"id": str(number), **text}})

    def _text(self, value: Any) -> dict[str, Any]:
        if self.is_caption:
            value = value[0] if isinstance(value, list) and value else value
            if not isinstance(value, str):
                raise BadSample(f"column {self.text_column!r} holds {type(value).__name__}, not a text", NO_CAPTION)
            return {"caption": value}
        if isinstance(value, dict):  # how `datasets` stored lists of objects before version 4: an object of lists
            columns = [column if isinstance(column, list) else [] for column in value.values()]
            if len({len(column) for column in columns}) != 1:
                raise BadSample(f"the lists in column {self.text_column!r} differ in length", MALFORMED_ENTRY)
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
        if not isinstance(value, list):
            raise BadSample(f"column {self.text_column!r} holds {type(value).__name__}, not turns", MALFORMED_ENTRY)
        is_llava = bool(value) and isinstance(value[0], dict) and "from" in value[0]
        return {"conversations" if is_llava else "messages": value}

    def _bytes(self, cell: Any) -> bytes:
        if not isinstance(cell, dict) or (cell.get("bytes") is None and not cell.get("path")):
            raise BadSample("the cell has no picture", NO_PICTURE)
        if cell["bytes"] is not None:
            return cell["bytes"]
        path = os.path.abspath(cell["path"])
        if not self._is_own(path):
            raise BadSample(f"{cell['path']}: the row names a file outside of the data set", OUTSIDE)
        try:
            return Path(path).read_bytes()
        except FileNotFoundError as error:
            raise BadSample(f"{path}: no such picture", NO_PICTURE) from error
        except OSError as error:
            raise BadSample(f"{path}: {error}", UNREADABLE) from error

    def _is_own(self, path: str) -> bool:
        """Rows may name files. Those of the data set and its caches are read, but not any file of this machine.

        A link that lies there may lead elsewhere: whoever placed it could read what it leads to.
        """
        own = [plain(folder) for folder in self._folders for plain in (os.path.abspath, os.path.realpath)]
        return any(path == folder or path.startswith(folder + os.sep) for folder in own)


def _load(source: str, split: str, config_name: str | None) -> Dataset:
    folder = Path(source)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            dataset = datasets.load_from_disk(source)
        elif folder.suffix == ".parquet":
            dataset = datasets.load_dataset("parquet", data_files=source, split=split)
        else:
            dataset = datasets.load_dataset(source, config_name, split=split)
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise DataError(f"{source}: no split {split!r}; --split names one of {', '.join(dataset)}")
            dataset = dataset[split]
    except DataError:
        raise
    except Exception as error:  # readers of many formats, and the network, each with errors of their own
        message = " ".join(str(error).split())
        raise DataError(
            f"{source}: `datasets` cannot open split {split!r} ({type(error).__name__}: {message}); expected a name on "
            f"the hub, a folder or a parquet file; --split and --config-name choose among several"
        ) from error
    return dataset


def _identity(dataset: Dataset) -> dict[str, Any]:
    """What a data set of the same content has in common on every machine: rows, columns, and where its content is
    hashed, that hash: `datasets` puts it into the folder of its cache, `save_to_disk` into state.json."""
    files = [Path(file["filename"]) for file in dataset.cache_files]
    cached = [file for file in files if file.is_relative_to(datasets.config.HF_DATASETS_CACHE)]
    name = sorted({str(file.parent.relative_to(datasets.config.HF_DATASETS_CACHE)) for file in cached})
    return {
        "rows": len(dataset),
        "columns": dataset.column_names,
        "content": name or dataset._fingerprint,
    }


def _holds_pictures(feature: Any) -> bool:
    return isinstance(feature.feature if isinstance(feature, List) else feature, Image)


def _may_hold_pictures(feature: Any) -> bool:
    """Parquet of other tools has no word for "picture": it holds bytes, or objects of bytes and path."""
    if isinstance(feature, List):
        feature = feature.feature
    binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    return binary or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _find_images(source: str, dataset: Dataset) -> str:
    found = [column for column, feature in dataset.features.items() if _holds_pictures(feature)]
    found = found or [column for column, feature in dataset.features.items() if _may_hold_pictures(feature)]
    if len(found) != 1:
        several = f"{len(found)} columns with pictures" if found else "no column with pictures"
        raise DataError(f"{source}: {several}; --image-column names the one to use; {_columns(dataset)}")
    return found[0]


def _find_text(source: str, dataset: Dataset) -> str:
    for names in (CONVERSATION_COLUMNS, CAPTION_COLUMNS):
        found = [column for column in dataset.column_names if column in names]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise DataError(
        f"{source}: --text-column (captions) or --conversations-column (turns) must name the text; {_columns(dataset)}"
    )


def _columns(dataset: Dataset) -> str:
    return "the columns are " + ", ".join(f"{name} ({feature})" for name, feature in dataset.features.items())
