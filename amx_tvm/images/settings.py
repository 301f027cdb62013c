"""What an artifact says of images: the tower's tiles, their rows in a prompt, their preparation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from typing import Annotated, Any

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.images.crop import Crop
from amx_tvm.images.reading import ImageInput, opened
from amx_tvm.images.tiles import Tiles
from amx_tvm.schema import Count, Range, TokenId

_MOST_SHARE = 200  # times the shorter edge that the longer one may be: beyond it nothing is seen


@dataclass(frozen=True, eq=False)
class PromptImage:
    """An image that is ready for the tower.

    Attributes
    ----------
    tiles : ndarray
        uint8 [tiles, edge, edge, 3].
    text : str
        What stands for it in the prompt.
    digest : bytes
        Of the tiles: two images of one digest are the same to the model.
    """

    tiles: np.ndarray
    text: str
    digest: bytes


@dataclass(frozen=True)
class ImageSettings:
    """How images become rows of a prompt.

    Attributes
    ----------
    token : int
        The token that stands in a prompt for an image, and in its place for each of its rows.
    edge, patch : int
        Pixels of a tile's and of a patch's edge.
    rows : int
        Rows of a prompt that a tile becomes.
    scale : float
        Times a pixel's value, 0 to 255, before the mean is taken from it.
    mean, std : tuple of float
        Of the three channels.
    processing : Tiles or Crop
        How an image becomes tiles.
    """

    token: TokenId
    edge: Count
    patch: Count
    rows: Count
    scale: Annotated[float, Range(1e-9, 1e9)]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    processing: Tiles | Crop

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values; `schema.conform` reads them back."""
        return asdict(self)

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return (self.edge // self.patch) ** 2

    def prepare(self, given: ImageInput, token: str) -> PromptImage:
        """Open an image and make its tiles; ``token`` is the text of `token`.

        Raises
        ------
        GenerationError
            For what is no image, or one that is too large or too narrow.
        """
        image = opened(given)
        if max(image.size) > _MOST_SHARE * min(image.size):
            raise GenerationError(
                f"an image has {image.width} x {image.height} pixels, expected edges of which none "
                f"is longer than {_MOST_SHARE} times the other; cut it"
            )
        tiles, text = self.processing.prepare(image, token, self.rows)
        return PromptImage(tiles, text, sha256(tiles.tobytes()).digest())

    def pixels(self, tiles: np.ndarray) -> np.ndarray:
        """Return tiles uint8 [tiles, edge, edge, 3] as the tower's patches.

        Returns
        -------
        ndarray
            float32 [tiles, patches, 3 * patch * patch], a patch's channels one behind the other.
        """
        side, patch = self.edge // self.patch, self.patch
        cut = tiles[:, : side * patch, : side * patch]
        cut = cut.reshape(len(tiles), side, patch, side, patch, 3).transpose(0, 1, 3, 5, 2, 4)
        made = self._values[np.arange(3)[:, None, None], cut]
        return made.reshape(len(tiles), self.patches, -1)

    @cached_property
    def _values(self) -> np.ndarray:
        """What a pixel's value becomes, float32 [3, 256], rounded as transformers does."""
        scaled = (np.arange(256).astype(np.float64) * self.scale).astype(np.float32)
        mean, std = (np.array(x, np.float32)[:, None] for x in (self.mean, self.std))
        return (scaled - mean) / std
