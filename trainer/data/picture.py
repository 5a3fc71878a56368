"""Encoded picture -> upright RGB. Pillow does the decoding; what is decoded, and how large, is decided here.

Imports neither torch nor transformers, so that tools which only look at pictures start at once.
"""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from trainer.errors import BadSample

UNDECODABLE = "picture cannot be decoded"
TOO_LARGE = "picture too large"
"""Kinds of `BadSample`."""

MAX_PIXELS = 2**26
"""The largest picture that is decoded: 67 megapixels, 256 MiB in memory and, while transparency is mixed or the picture
resized, up to four times that in a worker. Full-frame cameras stay below it (61 megapixels); a few hundred bytes of PNG
can claim a hundred times as many."""

# By their first bytes, whatever the file is called. Not `Image.open`: it would try every format Pillow knows (EPS runs
# Ghostscript), and its own check of the size warns or raises by settings that belong to the whole process.
_FORMATS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
    b"GIF8": GifImagePlugin.GifImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
}

_ORIENTATION = 0x0112
"""The EXIF tag that says how the stored picture is to be turned."""
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(encoded: bytes) -> Image.Image:
    """Encoded picture (JPEG, PNG, WebP, GIF, BMP) -> upright RGB image, of an animation the first frame.

    Transparency is laid over white. Raises BadSample if it cannot be decoded whole, or has more than `MAX_PIXELS`.
    """
    try:
        if encoded.startswith(b"RIFF"):
            _check_size(*_webp_size(encoded))  # its decoder holds the whole picture twice as soon as it is opened
        image: Image.Image = _open(io.BytesIO(encoded))
        _check_size(*image.size)
        image.load()
        if image.format == "PNG" and image.mode == "L" and "transparency" in image.info:
            # Gray of 2 or 4 bits, says byte 24: Pillow spreads the levels over 0 to 255, but not the transparent one.
            image.info["transparency"] *= 255 // (2 ** encoded[24] - 1)
        # After the pixels, for a PNG may have its EXIF behind them.
        turn = _TO_UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
        if image.mode != "RGB" or image.has_transparency_data:
            image = _to_rgb(image)
        if turn is not None:
            image = image.transpose(turn)
            image.info.clear()  # lest someone turn it again
        return image
    except BadSample:
        raise
    except Image.DecompressionBombError as error:  # a GIF's frame may be larger than its header says
        raise BadSample(f"the picture is too large ({error})", TOO_LARGE) from error
    except Exception as error:  # of a damaged picture Pillow makes errors of many classes, struct.error among them
        raise BadSample(f"the picture cannot be decoded ({error})", UNDECODABLE) from error


def format_name(encoded: bytes) -> str | None:
    """Pillow's name ("JPEG", "WEBP") of the format that a picture is decoded as; None where it is none of those."""
    opened = _format(encoded)
    return opened.format if opened else None


def header_size(picture: bytes | Path | BinaryIO) -> tuple[int, int]:
    """Width and height as stored (before EXIF turns it), from the header alone; (0, 0) if that cannot be read.

    picture: its bytes, its file, or a file open for reading that stands at its beginning.
    """
    try:
        if isinstance(picture, Path):
            with picture.open("rb") as file:
                return header_size(file)
        source = io.BytesIO(picture) if isinstance(picture, bytes) else picture
        start = _peek(source, 30)
        return _webp_size(start) if start.startswith(b"RIFF") else _open(source).size
    except Exception:  # as in `decode`
        return 0, 0


def _peek(file: BinaryIO, size: int) -> bytes:
    start = file.read(size)
    file.seek(-len(start), io.SEEK_CUR)
    return start


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    """Reads the header; no pixel is decoded."""
    opened = _format(_peek(file, 8))
    if opened is None:
        raise ValueError("its format is not known; JPEG, PNG, WebP, GIF and BMP are")
    return opened(file)


def _format(start: bytes) -> type[ImageFile.ImageFile] | None:
    return next((opened for magic, opened in _FORMATS.items() if start.startswith(magic)), None)


def _webp_size(start: bytes) -> tuple[int, int]:
    """Of its first 30 bytes (RFC 9649, sections 2.5 to 2.7): Pillow would read and open all of the file."""
    if len(start) < 30 or start[8:12] != b"WEBP":
        raise ValueError("not a WebP, or cut off in its header")
    if start[12:16] == b"VP8X":
        return 1 + int.from_bytes(start[24:27], "little"), 1 + int.from_bytes(start[27:30], "little")
    if start[12:16] == b"VP8L":
        sides = int.from_bytes(start[21:25], "little")
        return 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    return int.from_bytes(start[26:28], "little") & 0x3FFF, int.from_bytes(start[28:30], "little") & 0x3FFF


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadSample(
            f"the picture is too large ({width} x {height}; at most {MAX_PIXELS:,} pixels are decoded)", TOO_LARGE
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        levels = np.asarray(image)
        # The transparent level is one of 65,536: once the levels are 256, it would name others too.
        opaque = levels != image.info.get("transparency", -1)
        image = Image.fromarray(np.where(opaque, levels // 257, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
