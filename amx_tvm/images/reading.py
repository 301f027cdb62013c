"""Opening images: files, bytes and Pillow's objects, within limits, as RGB.

What is transparent lies on white, and a photograph stands as its camera was held.
"""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

ImageInput = Union[str, "os.PathLike[str]", bytes, np.ndarray, "Image"]

MOST_BYTES = 32 << 20  # of a file
MOST_PIXELS = 64 << 20  # of an image
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def opened(given: Any) -> Image:
    """Return an image in RGB.

    Parameters
    ----------
    given : path, bytes, ndarray or PIL.Image.Image
        A file or its content, uint8 [height, width, 3], or an image of Pillow's.

    Raises
    ------
    GenerationError
        For a file that is not there, too large or no image, or where Pillow is missing.
    """
    pillow = require("PIL.Image", "images", "an image in a prompt", GenerationError)
    if isinstance(given, pillow.Image):
        return _in_rgb(_sized(given, "an image"), pillow)
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.ndim != 3 or given.shape[2] != 3:
            raise GenerationError(
                f"an image is an array {given.dtype} {list(given.shape)}, expected uint8 "
                "[height, width, 3]"
            )
        return _sized(pillow.fromarray(given), "an image")
    if isinstance(given, bytes):
        return _of_bytes(given, "an image", pillow)
    if not isinstance(given, str | os.PathLike):
        raise GenerationError(
            f"an image is a {type(given).__name__}, expected a file's name or content, an array or "
            "an image of Pillow's"
        )
    path = Path(given)
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MOST_BYTES and path.is_file() else b""
    except (OSError, ValueError) as error:
        raise GenerationError(f"the image {given} cannot be read: {error}") from None
    if size > MOST_BYTES:
        raise GenerationError(
            f"the image {given} has {size} bytes, expected at most {MOST_BYTES}; make it smaller"
        )
    return _of_bytes(content, f"the image {given}", pillow)


def _of_bytes(content: bytes, name: str, pillow: Any) -> Image:
    if len(content) > MOST_BYTES:
        raise GenerationError(
            f"{name} has {len(content)} bytes, expected at most {MOST_BYTES}; make it smaller"
        )
    turn = require("PIL.ImageOps", "images", "an image in a prompt", GenerationError).exif_transpose
    try:
        image = _sized(pillow.open(BytesIO(content), formats=FORMATS), name)
        image.load()
        return _in_rgb(turn(image), pillow)
    except GenerationError:
        raise
    except Exception as error:  # of any of Pillow's decoders
        what = "is no image that is read" if isinstance(error, OSError) else "is damaged"
        raise GenerationError(
            f"{name} {what} ({error}); expected one of {', '.join(FORMATS)}"
        ) from None


def _sized(image: Image, name: str) -> Image:
    """Return an image whose size is within limits."""
    width, height = image.size
    if not width or not height or width * height > MOST_PIXELS:
        raise GenerationError(
            f"{name} has {width} x {height} pixels, expected from 1 to {MOST_PIXELS}; make it "
            "smaller"
        )
    return image


def _in_rgb(image: Image, pillow: Any) -> Image:
    """Return an image in RGB, on white where it is transparent."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        ground = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow.alpha_composite(ground, image)
    return image.convert("RGB")
