"""SmolVLM and Idefics3: an image is cut into square tiles, and the whole of it is one more.

The longest edge becomes ``longest`` pixels, both edges then the next multiples of a tile's. Without
splitting the whole image is the only tile. Sizes round as in transformers' processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Annotated

import numpy as np

from amx_tvm.schema import Count, OneOf, Range

if TYPE_CHECKING:
    from PIL.Image import Image

AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"
_MOST = 4096  # pixels of the longest edge, whatever is asked for


@dataclass(frozen=True)
class Tiles:
    """How an image becomes tiles.

    Attributes
    ----------
    tile : int
        Pixels of a tile's edge.
    longest : int
        Pixels of the image's longest edge before it is cut.
    split : bool
        Whether it is cut.
    resample : int
        Pillow's filter.
    """

    tile: Count
    longest: Count
    split: bool
    resample: Annotated[int, Range(0, 5)]
    kind: Annotated[str, OneOf(("tiles",))] = "tiles"

    def prepare(self, image: Image, token: str, rows: int) -> tuple[np.ndarray, str]:
        """Return an image's tiles, uint8 [tiles, tile, tile, 3], and its part of the prompt.

        Parameters
        ----------
        image : PIL.Image.Image
            In RGB.
        token : str
            The text that stands for one row.
        rows : int
            Of a tile.
        """
        edge = self.tile
        image = image.resize(self._scaled(*image.size), self.resample)
        columns = lines = 0
        parts: list[Image] = []
        if self.split:
            image = image.resize(self._whole_tiles(*image.size), self.resample)
            if image.width > edge or image.height > edge:
                columns, lines = image.width // edge, image.height // edge
                corners = [(x * edge, y * edge) for y in range(lines) for x in range(columns)]
                parts = [image.crop((x, y, x + edge, y + edge)) for x, y in corners]
        parts.append(image.resize((edge, edge), self.resample))
        return np.stack([np.asarray(part) for part in parts]), _text(lines, columns, token * rows)

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """Return the size whose longest edge is ``longest``; the other one is even."""
        share = width / height
        if width >= height:
            width = self.longest
            height = int(width / share)
            height += height % 2
        else:
            height = self.longest
            width = int(height * share)
            width += width % 2
        width, height = max(width, 1), max(height, 1)
        share = width / height
        if width >= height and width > _MOST:
            width, height = _MOST, int(_MOST / share)
        elif height > width and height > _MOST:
            width, height = int(_MOST * share), _MOST
        return max(width, 1), max(height, 1)

    def _whole_tiles(self, width: int, height: int) -> tuple[int, int]:
        """Return the next size of whole tiles."""
        share, edge = width / height, self.tile
        if width >= height:
            width = ceil(width / edge) * edge
            height = ceil(int(width / share) / edge) * edge
        else:
            height = ceil(height / edge) * edge
            width = ceil(int(height * share) / edge) * edge
        return width, height


def _text(lines: int, columns: int, tile: str) -> str:
    """Return an image's part of the prompt; ``tile`` is that of one tile's rows."""
    text = ""
    for line in range(1, lines + 1):
        for column in range(1, columns + 1):
            text += f"{AROUND}<row_{line}_col_{column}>{tile}"
        text += "\n"
    return f"{text}{chr(10) if lines else ''}{AROUND}{WHOLE}{tile}{AROUND}"
