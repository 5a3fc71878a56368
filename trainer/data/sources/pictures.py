"""Pictures of a source: read, checked as training will decode them, and named by the extension shards give them."""

import io
import os
from pathlib import Path

from PIL import Image

from trainer.data.index import IMAGE_EXTENSIONS
from trainer.data.picture import decode, format_name
from trainer.data.sources.source import Members, naming
from trainer.errors import BadSample

NO_PICTURE = "no such picture"
UNREADABLE = "picture cannot be read"
UNKNOWN_FORMAT = "picture of a format that shards do not hold"
OUTSIDE = "picture outside the folder"

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Of the formats that shards hold, of those that `decode` knows."""


def picture_members(folder: Path, files: list[str]) -> Members:
    """The pictures of one sample, read from the folder and checked, under their extensions."""
    members: Members = {}
    for position, file in enumerate(files):
        content = read_picture(folder, file)
        members[picture_extension(position, len(files), Path(file).suffix.lstrip(".").lower())] = content
    return members


def picture_extension(position: int, pictures: int, extension: str) -> str:
    """Of the only picture "jpg", of several "0.jpg", "1.jpg", ...: the index orders them by this number."""
    return extension if pictures == 1 else f"{position}.{extension}"


def read_picture(folder: Path, file: str) -> bytes:
    """The bytes of a picture below `folder` that can be decoded, in a format shards know. Raises BadSample."""
    path = folder / file
    # The normal form is also what is opened: `a/../b.jpg` is then `b.jpg`, even where `a` is a link to elsewhere.
    inside = os.path.normpath(file)
    if os.path.isabs(inside):
        raise BadSample(f"{file}: an absolute name; names of pictures start from the folder {folder}", OUTSIDE)
    if inside.split(os.sep)[0] == os.pardir:
        raise BadSample(f"{file}: leads out of the folder {folder}; names of pictures start from there", OUTSIDE)
    if path.suffix.lstrip(".").lower() not in IMAGE_EXTENSIONS:
        raise BadSample(f"{path}: shards hold pictures as {', '.join(IMAGE_EXTENSIONS)}", UNKNOWN_FORMAT)
    try:
        content = (folder / inside).read_bytes()
    except FileNotFoundError as error:
        raise BadSample(f"{path}: no such picture", NO_PICTURE) from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte or half a character in it
        raise BadSample(f"{path}: {error}", UNREADABLE) from error
    check_picture(content, str(path))
    return content


def bytes_as_picture(content: bytes, name: str) -> tuple[str, bytes]:
    """(extension, bytes) of a picture without a name: as they are, or, in a format that shards do not hold, as PNG.

    Raises BadSample if it cannot be decoded.
    """
    picture = check_picture(content, name)
    if extension := _EXTENSIONS.get(format_name(content) or ""):
        return extension, content
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return "png", encoded.getvalue()


def check_picture(content: bytes, name: str) -> Image.Image:
    """Decodes a picture, as training will. Raises BadSample if that fails."""
    with naming(name):
        return decode(content)
