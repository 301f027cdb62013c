"""LLaVA 1.5: the shortest edge becomes the tower's, and the middle of the image is what it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from amx_tvm.schema import Count, OneOf, Range

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Crop:
    """How an image becomes one square.

    Attributes
    ----------
    shortest : int
        Pixels of the image's shortest edge before it is cut.
    edge : int
        Pixels of the square's edge.
    resample : int
        Pillow's filter.
    """

    shortest: Count
    edge: Count
    resample: Annotated[int, Range(0, 5)]
    kind: Annotated[str, OneOf(("crop",))] = "crop"

    def prepare(self, image: Image, token: str, rows: int) -> tuple[np.ndarray, str]:
        """Return the square, uint8 [1, edge, edge, 3], and the image's part of the prompt.

        Parameters
        ----------
        image : PIL.Image.Image
            In RGB.
        token : str
            The text that stands for one row.
        rows : int
            Of the square.
        """
        width, height = image.size
        longest = int(self.shortest * max(width, height) / min(width, height))
        size = (self.shortest, longest) if width <= height else (longest, self.shortest)
        image = image.resize(size, self.resample)
        left, top = ((edge - self.edge) // 2 for edge in size)
        square = image.crop((left, top, left + self.edge, top + self.edge))
        return np.asarray(square)[None], token * rows
