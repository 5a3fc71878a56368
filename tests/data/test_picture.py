"""Pictures are decoded whole and upright, whatever their format and mode, or refused. The reference is plain numpy."""

import io
import random
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from trainer.data.picture import MAX_PIXELS, decode, header_size
from trainer.errors import BadSample

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def noise(width: int, height: int) -> Image.Image:
    """The hardest picture to resize alike: every wrong weight and every shift shows."""
    rng = np.random.default_rng(1000 * width + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


GRAY, RGB, PALETTE, GRAY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
"""Colour types of PNG (its specification, section 11.2.1)."""


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand; each row opens with its filter, 0."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


# --- Modes ---


def test_transparency_is_laid_over_white():
    # Red at alpha 128: 255 * 128/255 + 255 * 127/255 = 255 in red, 255 * 127/255 = 127 in green and blue.
    image = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate([(*RED, 255), (*RED, 128), (0, 0, 0, 0)]):
        image.putpixel((x, 0), pixel)
    for form in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        assert np.asarray(decode(encoded(image, form, **options))).tolist() == [[[*RED], [255, 127, 127], [*WHITE]]]


def test_transparent_gray_is_laid_over_white():
    image = Image.fromarray(np.array([[[0, 255], [0, 128], [0, 0]]], dtype=np.uint8), "LA")
    assert np.asarray(decode(encoded(image)))[0, :, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_becomes_white(form):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE, *[0] * 750])
    image.putpixel((1, 0), 1)
    assert np.asarray(decode(encoded(image, form))).tolist() == [[[*RED], [*BLUE]]]
    assert np.asarray(decode(encoded(image, form, transparency=1))).tolist() == [[[*RED], [*WHITE]]]


def test_a_palette_may_have_an_alpha_for_every_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    assert np.asarray(decode(encoded(image, transparency=bytes([255, 128])))).tolist() == [[[*RED], [127, 127, 255]]]


def test_a_transparent_colour_of_an_rgb_picture_becomes_white():
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    assert np.asarray(decode(encoded(image, transparency=BLUE))).tolist() == [[[*RED], [*WHITE]]]


def test_gray_pictures_have_three_equal_channels():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.asarray(decode(encoded(Image.fromarray(levels))))
    np.testing.assert_array_equal(pixels, np.stack([levels] * 3, -1))
    bits = Image.fromarray(levels > 127)
    assert bits.mode == "1"
    np.testing.assert_array_equal(np.asarray(decode(encoded(bits)))[..., 1], (levels > 127) * 255)


def test_16_bits_are_brought_to_8():
    # v of 255 is 257 v of 65,535: black, white and everything between keep their place, nothing is clipped.
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    picture = encoded(Image.fromarray(levels * 257))
    assert Image.open(io.BytesIO(picture)).mode == "I;16"
    np.testing.assert_array_equal(np.asarray(decode(picture)), np.stack([levels] * 3, -1))


def test_adobes_cmyk_is_stored_inverted_and_becomes_rgb():
    # Printing on white: what neither an ink nor the key takes away, (255 - ink) (255 - key) / 255.
    inks = np.kron(np.random.default_rng(0).integers(0, 256, (4, 4, 4)), np.ones((16, 16, 1))).astype(np.uint8)
    picture = encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in picture
    expected = (255 - inks[..., :3].astype(int)) * (255 - inks[..., 3:].astype(int)) / 255
    assert np.abs(np.asarray(decode(picture)) - expected).max() <= 4


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_of_few_bits_spans_all_levels_and_may_have_a_transparent_one(bits):
    # All levels of so many bits in one row: 0, 255 / top, ..., 255.
    top = 2**bits - 1
    row = sum(level << bits * (top - level) for level in range(top + 1)).to_bytes(max(1, bits * (top + 1) // 8), "big")
    row = bytes([row[0] << 6]) if bits == 1 else row
    levels = [255 * level // top for level in range(top + 1)]
    picture = png(top + 1, 1, bits, GRAY, b"\0" + row)
    assert np.asarray(decode(picture))[0, :, 1].tolist() == levels
    for transparent in (0, top - 1):
        picture = png(top + 1, 1, bits, GRAY, b"\0" + row, (b"tRNS", struct.pack(">H", transparent)))
        expected = [*levels[:transparent], 255, *levels[transparent + 1 :]]
        assert np.asarray(decode(picture))[0, :, 1].tolist() == expected


def test_of_16_bit_gray_exactly_the_transparent_level_becomes_white():
    # 300 and 301 are both 1 in 8 bits.
    picture = png(3, 1, 16, GRAY, b"\0" + struct.pack(">3H", 300, 301, 40_000), (b"tRNS", struct.pack(">H", 300)))
    assert np.asarray(decode(picture))[0, :, 0].tolist() == [255, 1, 40_000 // 257]


def test_16_bit_colours_and_alpha_are_brought_to_8():
    rows = b"\0" + struct.pack(">6H", *(257 * level for level in (7, 8, 9, 200, 0, 255)))
    assert np.asarray(decode(png(2, 1, 16, RGB, rows))).tolist() == [[[7, 8, 9], [200, 0, 255]]]
    rows = b"\0" + struct.pack(">4H", 257 * 7, 257 * 255, 0, 0)
    assert np.asarray(decode(png(2, 1, 16, GRAY_ALPHA, rows))).tolist() == [[[7] * 3, [255] * 3]]
    # 255 - alpha / 255 (255 - level), by halves: at alpha 128 of 255, 0 becomes 127.
    rows = b"\0" + struct.pack(">4H", 0, 257 * 255, 257 * 7, 257 * 128)
    assert np.asarray(decode(png(1, 1, 16, RGB_ALPHA, rows))).tolist() == [[[127, 255, 131]]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_all_depths(bits):
    # Four pixels (two at one bit), the first bits of the row first.
    indices = [1, 0, 1, 1] if bits == 1 else [2, 0, 3, 1]
    row = sum(index << bits * (3 - i) for i, index in enumerate(indices)) << (-4 * bits % 8)
    row = b"\0" + row.to_bytes((4 * bits + 7) // 8, "big")
    colours = [[9, 8, 7], [*RED], [*BLUE], [1, 2, 3]][: 2**bits]
    palette = (b"PLTE", bytes(sum(colours, [])))
    assert np.asarray(decode(png(4, 1, bits, PALETTE, row, palette))).tolist() == [[colours[i] for i in indices]]
    picture = png(4, 1, bits, PALETTE, row, palette, (b"tRNS", bytes([0])))
    colours[0] = [*WHITE]
    assert np.asarray(decode(picture)).tolist() == [[colours[i] for i in indices]]


def test_alpha_is_mixed_with_white_at_every_level():
    # 255 (255 - alpha) / 255 + level alpha / 255, rounded: over all alphas and levels, at most half a level off.
    alpha, level = (np.arange(256).repeat(256).reshape(256, 256), np.arange(256)[None].repeat(256, 0))
    image = Image.fromarray(np.stack([level] * 3 + [alpha], -1).astype(np.uint8), "RGBA")
    expected = (255 * (255 - alpha) + level * alpha) / 255
    assert np.abs(np.asarray(decode(encoded(image)))[..., 2] - expected).max() <= 0.51


@pytest.mark.parametrize("sides", [(1, 1), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_the_smallest_and_longest_pictures_of_every_mode(sides, mode):
    # White stays white through every conversion.
    white = {"P": 0, "1": 1, "I;16": 65_535, "CMYK": (0, 0, 0, 0), "L": 255, "LA": (255, 255)}
    image = Image.new(mode, sides, white.get(mode, (255,) * len(mode)))
    if mode == "P":
        image.putpalette([*WHITE, *[0] * 765])
    picture = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    found = decode(picture)
    assert found.mode == "RGB"
    assert found.size == sides == header_size(picture)
    assert np.asarray(found).min() == 255


# --- Orientation and frames ---

STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
"""How a camera stores an upright picture under each EXIF orientation; 6: to be turned clockwise by the viewer."""

ORIENTATION = 0x0112


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_pictures_are_upright(orientation, form):
    upright = np.kron(
        np.array([[[*RED], [*BLUE], [*WHITE]], [[0, 0, 0], [90, 90, 90], [9, 200, 9]]]), np.ones((16, 16, 1))
    )
    upright = upright.astype(np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}[form]
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    pixels = np.asarray(decode(encoded(stored, form, exif=exif, **options)))
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() <= (4 if form == "JPEG" else 0)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(form):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if form == "WEBP" else {}
    picture = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(picture)).n_frames == 2
    assert (np.asarray(decode(picture)) == RED).all()


def test_an_upright_picture_is_not_turned_again():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for form in ("PNG", "WEBP", "JPEG"):
        upright = decode(encoded(noise(24, 20), form, exif=exif))
        assert upright.size == (20, 24)
        np.testing.assert_array_equal(ImageOps.exif_transpose(upright), upright)


def test_an_exif_behind_the_pixels_is_followed():
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    picture = encoded(noise(5, 4))
    picture = picture[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + picture[-12:]
    np.testing.assert_array_equal(decode(picture), np.asarray(noise(5, 4))[::-1, ::-1])


def test_a_transparent_picture_is_turned_too():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = Image.fromarray(np.array([[[0, 0], [0, 255], [9, 255]]], dtype=np.uint8), "LA")
    assert np.asarray(decode(encoded(image, exif=exif)))[:, 0, 0].tolist() == [255, 0, 9]


def test_a_gif_smaller_than_its_canvas_lies_on_white():
    # Written by hand: a canvas of 2 x 1, whose first frame is one red pixel on the right; the rest is transparent.
    canvas = b"GIF89a" + struct.pack("<HHBBB", 2, 1, 0x80, 0, 0) + bytes([*BLUE, *RED])
    control = b"\x21\xf9\x04" + struct.pack("<BHB", 1, 0, 0) + b"\0"
    frame = b"\x2c" + struct.pack("<HHHHB", 1, 0, 1, 1, 0)
    # Codes of 3 bits, the lowest first: clear (4), pixel of index 1, end (5): 0b101_001_100.
    pixels = b"\x02\x02" + struct.pack("<H", 0b101_001_100) + b"\0\x3b"
    assert np.asarray(decode(canvas + control + frame + pixels)).tolist() == [[[*WHITE], [*RED]]]


# --- The header ---

PICTURES = {
    "PNG": encoded(noise(24, 20)),
    "JPEG": encoded(noise(24, 20), "JPEG"),
    "progressive JPEG": encoded(noise(24, 20), "JPEG", progressive=True),
    "WEBP": encoded(noise(24, 20), "WEBP"),
    "lossless WEBP": encoded(noise(24, 20), "WEBP", lossless=True),
    "animated WEBP": encoded(noise(24, 20), "WEBP", save_all=True, append_images=[Image.new("RGB", (24, 20))]),
    "GIF": encoded(noise(24, 20), "GIF"),
    "BMP": encoded(noise(24, 20), "BMP"),
}


@pytest.mark.parametrize("form", PICTURES)
def test_the_size_is_read_from_the_header(tmp_path, form):
    picture, file = PICTURES[form], tmp_path / "picture"
    file.write_bytes(picture)
    assert header_size(picture) == (24, 20)
    assert header_size(file) == (24, 20)
    with file.open("rb") as opened:
        assert header_size(opened) == (24, 20)
    # The pixels need not be there; a JPEG's tables and a GIF's palette belong to the header.
    assert header_size(picture[: 800 if form == "GIF" or "JPEG" in form else 60]) == (24, 20)


@pytest.mark.parametrize("sides", [(1, 1), (300, 7), (16_383, 2), (3, 16_383)])
@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}])
def test_the_size_of_webp_is_read_from_every_header(sides, options):
    assert header_size(encoded(Image.new("RGB", sides), "WEBP", **options)) == sides


@pytest.mark.parametrize(
    "content", [b"", b"RIFF", b"\xff\xd8\xff", b"<html>404</html>", bytes(1000), b"%!PS-Adobe-3.0"]
)
def test_what_has_no_header_has_no_size(tmp_path, content):
    assert header_size(content) == (0, 0)
    (tmp_path / "file").write_bytes(content)
    assert header_size(tmp_path / "file") == (0, 0)
    assert header_size(tmp_path / "absent") == (0, 0)


# --- Too large ---


def with_size(form: str, width: int, height: int) -> bytes:
    """A small picture whose header claims another size."""
    picture = PICTURES[form]
    if form == "PNG":
        return picture[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, RGB, 0, 0, 0)) + picture[33:]
    if form == "JPEG":
        at = picture.index(b"\xff\xc0") + 5
        return picture[:at] + struct.pack(">HH", height, width) + picture[at + 4 :]
    if form == "GIF":
        return picture[:6] + struct.pack("<HH", width, height) + picture[10:]
    assert form == "animated WEBP"
    return picture[:24] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + picture[30:]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "animated WEBP"])
@pytest.mark.parametrize("sides", [(8193, 8192), (10_000, 10_000), (16_000, 16_000), (60_000, 60_000)])
def test_a_picture_too_large_to_hold_is_refused_by_its_header(form, sides):
    # 10,000 x 10,000 is where Pillow itself warns, at 16,000 x 16,000 it raises: neither shows.
    assert MAX_PIXELS == 8192 * 8192
    picture = with_size(form, *sides)
    with pytest.raises(BadSample, match=f"too large .{sides[0]} x {sides[1]}; at most 67,108,864") as refused:
        decode(picture)
    assert refused.value.kind == "picture too large"
    assert header_size(picture) == sides


def test_the_limit_itself_is_allowed_and_no_setting_is_touched(monkeypatch):
    monkeypatch.setattr("trainer.data.picture.MAX_PIXELS", 24 * 20)
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    assert decode(PICTURES["PNG"]).size == (24, 20)
    monkeypatch.setattr("trainer.data.picture.MAX_PIXELS", 24 * 20 - 1)
    with pytest.raises(BadSample, match="too large"):
        decode(PICTURES["PNG"])
    assert before == (Image.MAX_IMAGE_PIXELS, list(warnings.filters))


# --- What cannot be decoded ---


@pytest.mark.parametrize("picture", [b"", b"<html>404</html>", bytes(1000), b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(BadSample, match=r"^the picture cannot be decoded \(its format is not known") as refused:
        decode(picture)
    assert refused.value.kind == "picture cannot be decoded"


@pytest.mark.parametrize("form", PICTURES)
def test_a_picture_is_decoded_whole_or_refused(form):
    # Cut anywhere: never half gray. Where only an end mark is lost, all pixels are there.
    picture = PICTURES[form]
    whole = np.asarray(decode(picture))
    refused = 0
    for end in [*range(0, len(picture) - 40, 7), *range(len(picture) - 40, len(picture))]:
        try:
            np.testing.assert_array_equal(decode(picture[:end]), whole, err_msg=f"cut at {end} of {len(picture)}")
        except BadSample as error:
            assert error.kind == "picture cannot be decoded"  # noqa: PT017
            refused += 1
    assert refused > 20


def with_broken_maker() -> bytes:
    """A JPEG whose EXIF says to turn it, and gives the camera's maker, a text, as a fraction."""
    entries = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0) + struct.pack("<HHII", 0x010F, 5, 1, 38)
    tiff = b"II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<III", 0, 1, 2)
    return encoded(noise(24, 20), "JPEG", exif=b"Exif\0\0" + tiff)


def test_of_a_damaged_exif_the_orientation_is_enough():
    assert decode(with_broken_maker()).size == (20, 24)
    assert header_size(with_broken_maker()) == (24, 20)  # as stored


@pytest.mark.parametrize("form", PICTURES)
def test_damaged_bytes_give_pixels_or_a_bad_sample(form):
    # Never another error: a run must be able to name the sample.
    rng, refused = random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(PICTURES[form])
        for _ in range(rng.randint(1, 20)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            assert decode(bytes(damaged)).mode == "RGB"
        except BadSample:
            refused += 1
        assert isinstance(header_size(bytes(damaged)), tuple)
    assert refused


def test_decoding_imports_neither_torch_nor_transformers():
    code = (
        "import sys, trainer.data.picture; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
