"""Pixels of any kind -> 8-bit RGB."""

import numpy as np
from PIL import Image

from elastic.media.errors import MediaError
from elastic.media.files import Place


def to_rgb(path: Place, image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB: composited over white, 16 bits scaled to 8 and rounded.

    Raises:
      MediaError: the pixels are of a type whose range is not known.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise MediaError(
            f"{str(path)!r} holds floating-point pixels of no known range; save it as 8 bits."
        )
    if image.mode.startswith("I"):  # Pillow's convert would clip them to white
        gray = np.asarray(image)
        if gray.size and not 0 <= gray.min() <= gray.max() <= 65535:
            raise MediaError(
                f"{str(path)!r} holds 32-bit pixels beyond 65535; save it as 8 or 16 bits."
            )
        return Image.fromarray(((gray.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")
