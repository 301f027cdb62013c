"""Where a module's weights are in a checkpoint that names, fuses or stores them differently.

A family's ``weight`` function answers one name at a time with a :class:`Weight`;
``amx_tvm.frontends.family_source`` applies the answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from amx_tvm.models.config import DecoderConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Weight:
    """How one weight of the module is read from the checkpoint, in this order.

    Parameters
    ----------
    name : str
        Its name there.
    index : int or None
        Which entry of a stack along axis 0, such as one expert of many.
    transpose : bool
        Stored as [in_features, out_features].
    rows : tuple of int or None
        First row and one past the last of a fused weight; ``step`` apart.
    step : int
        Distance of the rows, for weights that interleave two projections.
    offset, factor : float
        Added to every value, and what the sum is multiplied by.
    order : tuple of int or None
        Channels of every head in the order in which they are read. Here channel i turns with i +
        half; where neighbouring channels turn together, the order is another.
    flat : bool
        Stored with more axes behind the first, of which the module's second is all.
    """

    name: str
    index: int | None = None
    transpose: bool = False
    rows: tuple[int, int] | None = None
    step: int = 1
    offset: float = 0.0
    factor: float = 1.0
    order: tuple[int, ...] | None = None
    flat: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a stored shape becomes."""
        shape = tuple(stored[1:] if self.index is not None else stored)
        shape = (shape[0], prod(shape[1:])) if self.flat else shape
        shape = shape[::-1] if self.transpose else shape
        if self.rows is not None:
            count = len(range(*self.rows, self.step)) if self.rows[1] <= shape[0] else -1
            shape = (count, *shape[1:])
        return shape

    def take(self, array: np.ndarray) -> np.ndarray:
        """Return what this weight is of the stored array (or entry), without offset and factor."""
        array = array.reshape(len(array), -1) if self.flat else array
        array = array.T if self.transpose else array
        array = array if self.rows is None else array[slice(*self.rows, self.step)]
        if self.order is None:
            return array
        heads = array.reshape(-1, len(self.order), *array.shape[1:])
        return np.ascontiguousarray(heads[:, self.order]).reshape(array.shape)


def paired(name: str, config: DecoderConfig) -> Weight:
    """Find a weight of a family that turns neighbouring channels; for ``ModelFamily.weight``."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return Weight(name)
    turned = range(config.rotary_dim or config.head_dim)
    return Weight(name, order=(*turned[::2], *turned[1::2], *range(len(turned), config.head_dim)))


@dataclass(frozen=True)
class Names:
    """What a checkpoint calls an encoder's weights.

    Attributes
    ----------
    layers, tables : str
        What stands in front of a layer's number, and of all else.
    parts, others : mapping
        Its words for parts of a layer and for all else, where they are not the module's.
    """

    layers: str
    tables: str
    parts: Mapping[str, str]
    others: Mapping[str, str]

    def of(self, name: str) -> str:
        """Return the checkpoint's name of a module's weight."""
        stem, _, kind = name.removeprefix("model.").rpartition(".")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            return f"{self.layers}{layer}.{self.parts.get(part, part)}.{kind}"
        return f"{self.tables}{self.others.get(stem, stem)}.{kind}"
