"""Opening images: files, bytes and Pillow's objects, within limits, as RGB.

What is transparent lies on white, a photograph stands as its camera was held, of an animation the
first picture is taken, and 16 bits a channel become the upper 8.
"""

from __future__ import annotations

import os
from collections.abc import Callable
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
        return _decoded(lambda: given, "an image", pillow)
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
    return _decoded(lambda: pillow.open(BytesIO(content), formats=FORMATS), name, pillow)


def _decoded(open_: Callable[[], Image], name: str, pillow: Any) -> Image:
    """Return an image in RGB; what any of Pillow's decoders says of it is a GenerationError."""
    turn = require("PIL.ImageOps", "images", "an image in a prompt", GenerationError).exif_transpose
    try:
        image = _sized(open_(), name)
        image.load()
        return _in_rgb(turn(_in_eight_bits(image, name, pillow)), pillow)
    except GenerationError:
        raise
    except require("PIL", "images", "an image in a prompt").UnidentifiedImageError:
        why = "is no image that is read"
    except Exception as error:
        what = "is no image that is read" if isinstance(error, OSError) else "is damaged"
        why = f"{what} ({error})"
    raise GenerationError(f"{name} {why}; expected one of {', '.join(FORMATS)}")


def _sized(image: Image, name: str) -> Image:
    """Return an image whose size is within limits."""
    width, height = image.size
    if not width or not height or width * height > MOST_PIXELS:
        raise GenerationError(
            f"{name} has {width} x {height} pixels, expected from 1 to {MOST_PIXELS} in all"
        )
    return image


def _in_eight_bits(image: Image, name: str, pillow: Any) -> Image:
    """Return an image of 8 bits a channel; converting, Pillow would cut 16 bits off at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise GenerationError(
            f"{name} has 32 bits a pixel, whose range is not known; save it with 8 or 16 bits"
        )
    return image


def _in_rgb(image: Image, pillow: Any) -> Image:
    """Return an image in RGB, on white where it is transparent."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        ground = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow.alpha_composite(ground, image)
    return image.convert("RGB")
