"""CLIP's image processor, with the two other ways to make a picture square that training knows.

The pixels are those of training, within one level of 256.
"""

import os

import numpy as np
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


class MQWenVLImageProcessor(CLIPImageProcessorPil):
    """Pictures -> `pixel_values` (N, 3, size, size), normalised.

    image_aspect: "crop": the short side is resized and the centre cut out; "pad": the long side is resized and the rest
    filled with the mean colour; "squash": both sides are resized. `size` and `crop_size` are the square's.
    """

    def __init__(self, image_aspect="crop", size=None, **kwargs):
        if image_aspect not in ("crop", "pad", "squash"):
            raise ValueError(f"image_aspect={image_aspect!r}: expected crop, pad or squash")
        side = dict(size or {"height": 224, "width": 224})
        kwargs.setdefault("crop_size", side)
        super().__init__(size=side, **kwargs)
        self.image_aspect = image_aspect

    def fetch_images(self, image_url_or_urls):
        """A file as it is stored: Transformers would drop its transparency. What is fetched from elsewhere has none."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            return Image.open(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def convert_to_rgb(self, image, input_data_format=None):
        """Upright, transparency laid over white, 16 bits scaled to 8, as in training."""
        if isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return super().convert_to_rgb(image, input_data_format)

    def resize(self, image, size, resample=None, **kwargs):
        """image (3, H, W) uint8 -> the same, resized; of "crop" the centre is still to be cut out."""
        picture = Image.fromarray(np.moveaxis(np.asarray(image), 0, -1))
        (width, height), side = picture.size, size.height
        resample = Image.Resampling.BICUBIC if resample is None else resample
        if self.image_aspect == "squash":
            resized = picture.resize((side, side), resample)
        elif self.image_aspect == "crop":  # the long side rounded down, as in CLIP's own
            short = min(width, height)
            resized = picture.resize((int(side * width / short), int(side * height / short)), resample)
        else:
            inner = [max(1, round(side * edge / max(width, height))) for edge in (width, height)]
            resized = Image.new("RGB", (side, side), tuple(round(255 * channel) for channel in self.image_mean))
            resized.paste(picture.resize(inner, resample), ((side - inner[0]) // 2, (side - inner[1]) // 2))
        return np.moveaxis(np.array(resized), -1, 0)
