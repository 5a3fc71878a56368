"""Encoded picture -> square uint8 pixels, as CLIP's image processor makes them, and their normalisation on the device.

Workers hand on uint8, a quarter of the bytes of fp32; the training device divides and subtracts.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trainer.errors import DataError

IMAGE_ASPECTS = ("crop", "pad", "squash")


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

    def __call__(self, encoded: bytes) -> torch.Tensor:
        """Encoded picture -> (3, size, size) uint8. Raises DataError if it cannot be decoded."""
        pixels = np.array(self._resize(decode(encoded)))  # (size, size, 3)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def _resize(self, image: Image.Image) -> Image.Image:
        size, (width, height) = self.size, image.size
        if self.aspect == "squash":
            return image.resize((size, size), Image.Resampling.BICUBIC)
        if self.aspect == "pad":
            colour = tuple(round(255 * channel) for channel in self.mean)
            # Not `ImageOps.pad`: of a strip (1 x 3000) it leaves nothing.
            inner = [max(1, round(size * side / max(width, height))) for side in (width, height)]
            picture = image.resize((inner[0], inner[1]), Image.Resampling.BICUBIC)
            square = Image.new("RGB", (size, size), colour)
            square.paste(picture, ((size - inner[0]) // 2, (size - inner[1]) // 2))
            return square
        # The long side is rounded down and the crop starts at the floor of the margin, as in CLIP's processor.
        short = min(width, height)
        resized = [int(size * width / short), int(size * height / short)]
        offset = [(side - size) // 2 for side in resized]
        # Of an extreme strip (1 x 3000) only the middle is resized, with a margin wider than the filter: the whole
        # would fill the memory. Pixels may differ a little, for Pillow chooses by size which side it resizes first.
        box = [0.0, 0.0, float(width), float(height)]
        margin = 2 * max(1, -(-size // short)) + 2
        for axis, side in enumerate((width, height)):
            if resized[axis] > 64 * size:
                zoom, start = resized[axis] / side, offset[axis] - margin
                box[axis], box[axis + 2] = start / zoom, (start + size + 2 * margin) / zoom
                resized[axis], offset[axis] = size + 2 * margin, margin
        left, top = offset
        image = image.resize((resized[0], resized[1]), Image.Resampling.BICUBIC, box=(box[0], box[1], box[2], box[3]))
        return image.crop((left, top, left + size, top + size))

    def to_processor(self) -> CLIPImageProcessorPil:
        """The image processor of Transformers with the same result ("pad" is left to this class)."""
        square = {"height": self.size, "width": self.size}
        size = square if self.aspect == "squash" else {"shortest_edge": self.size}
        return CLIPImageProcessorPil(size=size, crop_size=square, image_mean=list(self.mean), image_std=list(self.std))

    def normalize(self, pixel_values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(N, 3, H, W) uint8 -> `dtype`, zero mean and unit deviation over CLIP's training pictures."""
        mean = torch.tensor(self.mean, device=pixel_values.device)[:, None, None]
        std = torch.tensor(self.std, device=pixel_values.device)[:, None, None]
        return ((pixel_values.float() / 255 - mean) / std).to(dtype)


def decode(encoded: bytes) -> Image.Image:
    """Encoded picture -> upright RGB image; transparency is laid over white. Raises DataError if it cannot be read."""
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise DataError("the picture cannot be decoded (its format is not known)") from error
    except Exception as error:  # of a damaged picture Pillow makes errors of many classes, struct.error among them
        raise DataError(f"the picture cannot be decoded ({error})") from error
