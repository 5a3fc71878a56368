"""Pictures become the pixels that CLIP's own processor makes, whatever their size.

The reference is `CLIPImageProcessorPil` of Transformers: where Pillow resizes here as there, to the last bit; where
PyTorch's faster filter does, to one level of 255.
"""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from reference import shared
from test_picture import encoded, noise
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainer.data import transform as transform_module
from trainer.data.transform import IMAGE_ASPECTS, ImageTransform
from trainer.errors import BadSample

S = 28
"""Pixels a side, two patches of CLIP-ViT-L; a few tests use CLIP's own 224."""

WHITE = (255, 255, 255)


@pytest.fixture
def pillow_alone(monkeypatch):
    """As on a machine where PyTorch's filter is the slower one."""
    monkeypatch.setattr(transform_module, "FAST", False)


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


@pytest.mark.usefixtures("pillow_alone")
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


@pytest.mark.usefixtures("pillow_alone")
@pytest.mark.parametrize(("width", "height"), [(640, 480), (333, 500), (224, 224), (225, 224), (50, 1000)])
def test_pixels_are_those_of_clips_processor_at_its_own_size(width, height):
    image = noise(width, height)
    np.testing.assert_array_equal(ImageTransform(224)(encoded(image)), by_processor(clip_processor("crop", 224), image))


@pytest.mark.parametrize("aspect", ["crop", "squash"])
@pytest.mark.parametrize("width", SIDES)
def test_the_faster_filter_stays_within_one_level(monkeypatch, aspect, width):
    # The same, as users have it; and on machines without the faster filter it is taken all the same, if slowly.
    monkeypatch.setattr(transform_module, "FAST", True)
    transform, processor = ImageTransform(S, aspect), clip_processor(aspect)
    for height in SIDES:
        if max(width, height) > 64 * min(width, height):
            continue
        image = noise(width, height)
        pixels = transform(encoded(image))
        assert pixels.dtype == torch.uint8
        assert pixels.is_contiguous()
        expected = by_processor(processor, image).astype(int)
        np.testing.assert_allclose(pixels.int(), expected, rtol=0, atol=1, err_msg=f"{width} x {height}")


LARGE = [
    (640, 480), (480, 640), (640, 427), (427, 640), (448, 448), (1024, 768), (768, 1024), (2000, 1500),
    (448, 896), (448, 898), (448, 1400), (896, 448), (1400, 448),
]  # fmt: skip
"""What photos have, and tall ones on both sides of where Pillow changes the order in which it resizes the sides."""


@pytest.mark.parametrize("aspect", ["crop", "squash"])
@pytest.mark.parametrize("sides", LARGE)
def test_the_faster_filter_stays_within_one_level_at_clips_own_size(monkeypatch, aspect, sides):
    # Black and white at random: every filter overshoots and is clipped, so another order of the sides would show.
    image = noise(*sides).point(lambda level: 255 * (level > 127))
    picture = encoded(image, compress_level=1)
    expected = by_processor(clip_processor(aspect, 224), image).astype(int)
    monkeypatch.setattr(transform_module, "FAST", True)
    np.testing.assert_allclose(ImageTransform(224, aspect)(picture).int(), expected, rtol=0, atol=1)
    monkeypatch.setattr(transform_module, "FAST", False)
    np.testing.assert_array_equal(ImageTransform(224, aspect)(picture), expected)


def test_the_faster_filter_is_that_of_photos(monkeypatch):
    # Were it never taken, the tests above would pass as well.
    used = []
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr(transform_module, "FAST", True)
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda *a, **k: used.append(a[1]) or interpolate(*a, **k))
    for aspect in ("crop", "squash", "pad"):
        ImageTransform(224, aspect)(encoded(noise(640, 480)))
    assert used == [(224, 298), (224, 224), (168, 224)]
    ImageTransform(224)(encoded(noise(640, 400)))  # 400 / 224 = 1.8
    assert len(used) == 3


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


@pytest.mark.usefixtures("pillow_alone")
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
                # 100 pixels high: enlarged, by Pillow on every machine.
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
    found = pixels[top : top + inner[1], left : left + inner[0]].astype(int)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1)
    filled = (pixels == MEAN_COLOUR).all(-1).sum()
    assert filled >= S * S - inner[0] * inner[1]


def test_padding_is_zero_for_the_model():
    # The mean colour normalises to nothing: at most half a level of 255, over a deviation of 0.26.
    pixels = ImageTransform(S, "pad")(encoded(Image.new("RGB", (28, 2), WHITE)))
    margin = ImageTransform(S, "pad").normalize(pixels[None], torch.float32)[0, :, :5]
    assert margin.abs().max() < 0.5 / 255 / 0.26


# --- The smallest, and what cannot be decoded ---


@pytest.mark.parametrize("aspect", IMAGE_ASPECTS)
@pytest.mark.parametrize("sides", [(1, 1), (1, 2), (1, 3000), (3000, 1)])
def test_the_smallest_pictures_fill_the_square(aspect, sides):
    pixels = ImageTransform(S, aspect)(encoded(Image.new("RGB", sides, (10, 20, 30))))
    assert pixels.shape == (3, S, S)
    if aspect != "pad":
        assert (pixels == torch.tensor([10, 20, 30])[:, None, None]).all()


@pytest.mark.parametrize("aspect", IMAGE_ASPECTS)
def test_what_is_no_picture_is_a_bad_sample(aspect):
    with pytest.raises(BadSample, match="^the picture cannot be decoded"):
        ImageTransform(S, aspect)(b"<html>404</html>")
