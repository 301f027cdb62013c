"""Where a module's weights are in a checkpoint that names, fuses or stores them differently.

A family's ``weight`` function answers one name at a time with a :class:`Weight`;
:class:`FamilySource` applies the answers, so that everything behind it sees one way of naming and
shapes [out_features, in_features] whatever the checkpoint does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from amx_tvm.formats import Quantized
from amx_tvm.frontends.base import ModelSource

if TYPE_CHECKING:
    from amx_tvm.models.config import DecoderConfig
    from amx_tvm.models.registry import ModelFamily


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
    offset : float
        Added to every value.
    """

    name: str
    index: int | None = None
    transpose: bool = False
    rows: tuple[int, int] | None = None
    step: int = 1
    offset: float = 0.0

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a stored shape becomes."""
        shape = tuple(stored[1:] if self.index is not None else stored)
        shape = shape[::-1] if self.transpose else shape
        if self.rows is not None:
            count = len(range(*self.rows, self.step)) if self.rows[1] <= shape[0] else -1
            shape = (count, *shape[1:])
        return shape

    def take(self, array: np.ndarray) -> np.ndarray:
        """Return the view of the stored array (or entry) that this weight is, without offset."""
        array = array.T if self.transpose else array
        return array if self.rows is None else array[slice(*self.rows, self.step)]


class FamilySource(ModelSource):
    """A checkpoint under the module's names.

    Parameters
    ----------
    source : ModelSource
        The checkpoint.
    family : ModelFamily
        Whose ``weight`` function finds the weights.
    config : DecoderConfig
        The model's shape.
    names : iterable of str
        Weights of the module. Those that the checkpoint lacks are left out of ``names()``.
    """

    def __init__(
        self, source: ModelSource, family: ModelFamily, config: DecoderConfig, names: Iterable[str]
    ) -> None:
        self.source, self.name, self.kind = source, source.name, source.kind
        self.config, self.generation_config = source.config, source.generation_config
        present = set(source.names())
        self._weights = {}
        for name in names:
            places = (Weight(name),) if source.module_names else family.weights(name, config)
            found = [place for place in places if place.name in present]
            if found:
                self._weights[name] = found[0]

    def weight(self, name: str) -> Weight:
        """Return where a weight is."""
        if name not in self._weights:
            raise self.missing(name)
        return self._weights[name]

    def names(self) -> list[str]:
        """Return the module's weights that the checkpoint holds."""
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        weight = self.weight(name)
        return weight.shape(self.source.shape(weight.name))

    def dtype(self, name: str) -> str:
        """Return the stored type."""
        return self.source.dtype(self.weight(name).name)

    def load(self, name: str) -> np.ndarray:
        """Read one weight as float32."""
        weight = self.weight(name)
        if weight.index is None:
            array = weight.take(self.source.load(weight.name))
        else:
            array = weight.take(self.source.load_entry(weight.name, weight.index))
        return array + np.float32(weight.offset) if weight.offset else array

    def load_raw(self, name: str) -> Quantized | None:
        """Return stored codes and scales; None for weights that are transposed or shifted."""
        weight = self.weight(name)
        if weight.transpose or weight.offset:
            return None
        if weight.index is None:
            raw = self.source.load_raw(weight.name)
        else:
            raw = self.source.load_raw_entry(weight.name, weight.index)
        if raw is None:
            return None
        scales = {key: weight.take(value) for key, value in raw.scales.items()}
        return Quantized(weight.take(raw.codes), scales, raw.format, raw.tensor_scale)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return self.source.nbytes

    def write_tokenizer(self, directory: str | os.PathLike[str]) -> list[Any]:
        """Write the tokenizer of the checkpoint."""
        return self.source.write_tokenizer(directory)

    def digest(self) -> str:
        """Return the identity of the checkpoint."""
        return self.source.digest()
