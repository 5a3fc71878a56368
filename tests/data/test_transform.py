"""Pictures become the pixels that CLIP's own processor makes, whatever their mode, size or format.

The reference is `CLIPImageProcessorPil` of Transformers; where it has no say (modes, orientation), plain numpy.
"""

import io
import random
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from reference import shared
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainer.data.transform import IMAGE_ASPECTS, ImageTransform, decode
from trainer.errors import DataError

S = 28
"""Pixels a side, two patches of CLIP-ViT-L; a few tests use CLIP's own 224."""

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def noise(width: int, height: int) -> Image.Image:
    """The hardest picture to resize alike: every wrong weight and every shift shows."""
    rng = np.random.default_rng(1000 * width + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def clip_processor(aspect: str = "crop", size: int = S) -> CLIPImageProcessorPil:
    square = {"height": size, "width": size}
    return CLIPImageProcessorPil(
        size={"shortest_edge": size} if aspect == "crop" else square, crop_size=square, do_center_crop=aspect == "crop"
    )


def by_processor(processor: CLIPImageProcessorPil, image: Image.Image) -> np.ndarray:
    """(3, S, S), before rescaling and normalising."""
    return processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]


# --- As CLIP's processor ---

SIDES = [1, 2, 3, 7, 20, 27, 28, 29, 41, 56, 57, 99, 224, 301]


@pytest.mark.parametrize("aspect", ["crop", "squash"])
@pytest.mark.parametrize("width", SIDES)
def test_pixels_are_those_of_clips_processor(aspect, width):
    # Smaller, larger, equal, off by one, up to 64 times as long as wide: the last bit of every pixel.
    transform, processor = ImageTransform(S, aspect), clip_processor(aspect)
    for height in SIDES:
        if max(width, height) > 64 * min(width, height):
            continue
        image = noise(width, height)
        pixels = transform(encoded(image))
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (3, S, S)
        assert pixels.is_contiguous()
        np.testing.assert_array_equal(pixels, by_processor(processor, image), err_msg=f"{width} x {height}")


@pytest.mark.parametrize(("width", "height"), [(640, 480), (333, 500), (224, 224), (225, 224), (50, 1000)])
def test_pixels_are_those_of_clips_processor_at_its_own_size(width, height):
    image = noise(width, height)
    np.testing.assert_array_equal(ImageTransform(224)(encoded(image)), by_processor(clip_processor("crop", 224), image))


@pytest.mark.parametrize("sides", [(1, 3000), (2, 3000), (3, 900), (9, 1000)])
@pytest.mark.parametrize("lying", [False, True])
def test_the_middle_of_a_strip_is_that_of_clips_processor(sides, lying):
    # Of such strips only the middle is resized. One level of 255: Pillow rounds between height and width, and which of
    # them is first depends on the sizes. (It clips there as well; levels from 64 to 191 leave room for the overshoot.)
    width, height = sides[::-1] if lying else sides
    image = noise(width, height).point(lambda level: 64 + level // 2)
    expected = by_processor(clip_processor(), image).astype(int)
    assert expected.std() > 10  # it varies, so a shift would show
    np.testing.assert_allclose(ImageTransform(S)(encoded(image)).int(), expected, atol=1)


def test_a_strip_is_not_blown_up_whole():
    # All of it would be 224 x 2,240,000 pixels: gigabytes, and seconds.
    picture = encoded(noise(1, 10_000))
    start = time.process_time()
    ImageTransform(224)(picture)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("aspect", ["crop", "squash"])
def test_the_exported_processor_gives_the_pixels_that_were_trained(tmp_path, aspect):
    # What a checkpoint carries is read back and takes pictures all the way to normalised numbers, with a mean and a
    # deviation that are not CLIP's.
    transform = ImageTransform(S, aspect, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    transform.to_processor().save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    images = [noise(*size) for size in [(40, 31), (31, 40), (28, 28), (5, 9), (300, 20), (20, 300)]]
    pixels = torch.stack([transform(encoded(image)) for image in images])
    expected = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(transform.normalize(pixels, torch.float32), expected, atol=1e-6, rtol=1e-6)


def test_normalised_pixels_are_those_of_clips_processor():
    image = noise(60, 45)
    transform = ImageTransform(S)
    pixels = transform(encoded(image))[None]
    expected = clip_processor()(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(transform.normalize(pixels, torch.float32), expected, atol=1e-6, rtol=1e-6)
    # In half precision it is that, rounded once: nothing is computed in 8 bits.
    torch.testing.assert_close(transform.normalize(pixels, torch.bfloat16), expected.bfloat16(), atol=0, rtol=0)
    assert transform.normalize(pixels[:0], torch.bfloat16).shape == (0, 3, S, S)


def test_real_pictures_have_the_pixels_of_clips_processor():
    files = sorted(shared("real/nlvr/images").glob("*.png"))[::200]
    assert len(files) == 5
    for file in files:
        with Image.open(file) as image:
            # RGBA without transparency: over white it is what it is.
            assert image.mode == "RGBA"
            assert image.getextrema()[3] == (255, 255)
            for aspect in ("crop", "squash"):
                expected = by_processor(clip_processor(aspect, 224), image.convert("RGB"))
                np.testing.assert_array_equal(ImageTransform(224, aspect)(file.read_bytes()), expected)


# --- Padding ---

MEAN_COLOUR = (123, 117, 104)
"""255 times CLIP's mean, 0.48145466, 0.4578275, 0.40821073, rounded."""


@pytest.mark.parametrize(
    ("sides", "inner"),
    [
        ((56, 28), (28, 14)),
        ((28, 56), (14, 28)),
        ((40, 40), (28, 28)),
        ((100, 75), (28, 21)),
        ((7, 14), (14, 28)),
        ((1, 1), (28, 28)),
        ((1, 3000), (1, 28)),
        ((3000, 1), (28, 1)),
    ],
)
def test_padding_keeps_all_of_the_picture_and_its_proportions(sides, inner):
    image = noise(*sides)
    pixels = ImageTransform(S, "pad")(encoded(image)).permute(1, 2, 0).numpy()
    left, top = (S - inner[0]) // 2, (S - inner[1]) // 2
    expected = np.asarray(image.resize(inner, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pixels[top : top + inner[1], left : left + inner[0]], expected)
    filled = (pixels == MEAN_COLOUR).all(-1).sum()
    assert filled >= S * S - inner[0] * inner[1]


def test_padding_is_zero_for_the_model():
    # The mean colour normalises to nothing: at most half a level of 255, over a deviation of 0.26.
    pixels = ImageTransform(S, "pad")(encoded(Image.new("RGB", (28, 2), WHITE)))
    margin = ImageTransform(S, "pad").normalize(pixels[None], torch.float32)[0, :, :5]
    assert margin.abs().max() < 0.5 / 255 / 0.26


# --- Modes ---


def opaque(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


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


def test_cmyk_becomes_rgb():
    # Cyan, magenta, yellow and key, 0 to 255: no cyan, all magenta and yellow is red.
    picture = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert Image.open(io.BytesIO(picture)).mode == "CMYK"
    pixels = np.asarray(decode(picture)).astype(int)
    assert np.abs(pixels - RED).max() <= 3


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


# --- What cannot be decoded, and what is small ---


@pytest.mark.parametrize("aspect", IMAGE_ASPECTS)
@pytest.mark.parametrize("sides", [(1, 1), (1, 2), (1, 3000), (3000, 1)])
def test_the_smallest_pictures_fill_the_square(aspect, sides):
    pixels = ImageTransform(S, aspect)(encoded(Image.new("RGB", sides, (10, 20, 30))))
    assert pixels.shape == (3, S, S)
    if aspect != "pad":
        assert (pixels == torch.tensor([10, 20, 30])[:, None, None]).all()


PICTURES = {form: encoded(noise(24, 20), form) for form in ("PNG", "JPEG", "WEBP", "GIF")}


@pytest.mark.parametrize("picture", [b"", b"\xff\xd8\xff", b"<html>404</html>", bytes(1000)])
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(DataError, match=r"^the picture cannot be decoded \(its format is not known\)$"):
        ImageTransform(S)(picture)


@pytest.mark.parametrize("form", PICTURES)
def test_a_picture_cut_in_half_is_refused(form):
    picture = PICTURES[form]
    with pytest.raises(DataError, match="^the picture cannot be decoded"):
        ImageTransform(S)(picture[: len(picture) // 2])


def with_broken_maker() -> bytes:
    """A JPEG whose EXIF says to turn it, and gives the camera's maker, a text, as a fraction."""
    entries = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0) + struct.pack("<HHII", 0x010F, 5, 1, 38)
    tiff = b"II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<III", 0, 1, 2)
    return encoded(noise(24, 20), "JPEG", exif=b"Exif\0\0" + tiff)


def test_a_damaged_exif_is_a_data_error():
    with pytest.raises(DataError, match="^the picture cannot be decoded"):
        decode(with_broken_maker())


def test_a_picture_too_large_to_hold_is_refused():
    # 60,000 x 60,000 pixels, by the header alone: refused before any is decoded.
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    picture = PICTURES["PNG"]
    bomb = picture[:12] + header + struct.pack(">I", zlib.crc32(header)) + picture[33:]
    with pytest.raises(DataError, match="exceeds limit"):
        decode(bomb)


@pytest.mark.parametrize("form", PICTURES)
def test_damaged_bytes_give_pixels_or_a_data_error(form):
    # Never another error: a run must be able to name the sample.
    rng, refused = random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(PICTURES[form])
        for _ in range(rng.randint(1, 20)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            assert ImageTransform(S)(bytes(damaged)).shape == (3, S, S)
        except DataError:
            refused += 1
    assert refused
