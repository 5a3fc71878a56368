"""Encoded picture -> square uint8 pixels, as CLIP's or SigLIP's image processor makes them, and their normalisation on
the device.

Workers hand on uint8, a quarter of the bytes of fp32; the training device divides and subtracts.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from trainer.data.picture import decode

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge."""

IMAGE_ASPECTS = ("crop", "pad", "squash")

FAST_SHRINK = 1.9
"""From this factor on, PyTorch's bicubic filter stands in for Pillow's, at a seventh of the time. It weighs in 16 bits
where Pillow has 32: one level in two hundred is off by one. In 34 million levels of noise none was off by two; at 1.8
one was, at 1.5 sixteen, and enlarging made more."""

FAST = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
"""Elsewhere PyTorch's filter is a plain loop, slower than Pillow's."""


@dataclass(frozen=True)
class ImageTransform:
    """How pictures become pixels."""

    size: int
    """Pixels a side."""
    aspect: str = "crop"
    """"crop": the short side is resized and the centre cut out (CLIP's own); "pad": the long side is resized and the
    rest filled with the mean colour; "squash": both sides are resized."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Of CLIP's training pictures, red green blue, 0 to 1. (source: CLIP's preprocessor_config.json)"""
    resample: str = "bicubic"
    """The filter: CLIP's "bicubic", or "bilinear"."""

    def __call__(self, encoded: bytes) -> torch.Tensor:
        """Encoded picture -> (3, size, size) uint8, within one level of the tower's own processor.

        Raises BadSample if it cannot be decoded or is too large.
        """
        image = decode(encoded)
        size, (width, height) = self.size, image.size
        if self.aspect == "squash":
            return self._resize(image, size, size).contiguous()
        if self.aspect == "pad":
            # Not `ImageOps.pad`: of a strip (1 x 3000) it leaves nothing.
            inner = [max(1, round(size * side / max(width, height))) for side in (width, height)]
            left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
            colour = torch.tensor([round(255 * channel) for channel in self.mean], dtype=torch.uint8)
            square = colour[:, None, None].repeat(1, size, size)
            square[:, top : top + inner[1], left : left + inner[0]] = self._resize(image, inner[0], inner[1])
            return square
        # The long side is rounded down and the crop starts at the floor of the margin, as in CLIP's processor.
        short = min(width, height)
        resized = [int(size * width / short), int(size * height / short)]
        offset = [(side - size) // 2 for side in resized]
        # Of an extreme strip (1 x 3000) only the middle is resized, with a margin wider than the filter: the whole
        # would fill the memory. Pixels may differ a little, for Pillow chooses by size which side it resizes first:
        # which is also why the middle of other pictures is cut out afterwards.
        box: list[float] = [0, 0, width, height]
        margin = 2 * max(1, -(-size // short)) + 2
        for axis, side in enumerate((width, height)):
            if resized[axis] > 64 * size:
                zoom, start = resized[axis] / side, offset[axis] - margin
                box[axis], box[axis + 2] = start / zoom, (start + size + 2 * margin) / zoom
                resized[axis], offset[axis] = size + 2 * margin, margin
        left, top = offset
        pixels = self._resize(image, resized[0], resized[1], (box[0], box[1], box[2], box[3]))
        return pixels[:, top : top + size, left : left + size].contiguous()

    def _resize(self, image: Image.Image, width: int, height: int, box: Box | None = None) -> torch.Tensor:
        if self.resample == "bicubic":
            return resize(image, width, height, box)
        return by_pillow(image, width, height, box, Image.Resampling.BILINEAR)

    def normalize(self, pixel_values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(N, 3, H, W) uint8 -> `dtype`, zero mean and unit deviation over the tower's training pictures."""
        device = pixel_values.device
        mean, std = (torch.tensor(v)[:, None, None].to(device, non_blocking=True) for v in (self.mean, self.std))
        return (pixel_values * (1 / (255 * std))).sub_(mean / std).to(dtype)  # two passes over the pixels, not four


def resize(image: Image.Image, width: int, height: int, box: Box | None = None) -> torch.Tensor:
    """The picture, or a box of it -> (3, height, width) uint8, within one level of Pillow's bicubic filter."""
    # Pillow shortens a tall picture before it narrows it, rounding and clipping between; PyTorch never does.
    tall = image.height - height > 2 * (image.width - width)
    shrinks = image.width >= FAST_SHRINK * width and image.height >= FAST_SHRINK * height
    if FAST and shrinks and not tall and box in (None, (0, 0, image.width, image.height)):
        # With the fourth byte that Pillow pads each pixel with: to leave it out takes longer than to resize it.
        stored = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8)
        pixels = stored.view(1, image.height, image.width, 4).permute(0, 3, 1, 2)
        return torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0, :3]
    return by_pillow(image, width, height, box, Image.Resampling.BICUBIC)


def by_pillow(image: Image.Image, width: int, height: int, box: Box | None, resample: Image.Resampling) -> torch.Tensor:
    """The picture, or a box of it -> (3, height, width) uint8."""
    resized = image.resize((width, height), resample, box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
