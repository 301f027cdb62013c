"""A checkpoint under the names and shapes of its model family's module.

Everything behind it sees one way of naming and shapes [out_features, in_features], whatever the
checkpoint does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from amx_tvm.formats import Quantized
from amx_tvm.frontends.base import ModelSource
from amx_tvm.models import DecoderConfig, ModelFamily, Weight
from amx_tvm.models.config import BIAS_GROUPS, STORED_BIASES


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
        parts = [p for group in self.config.get(STORED_BIASES, ()) for p in BIAS_GROUPS[group]]
        optional = tuple(f"{part}.bias" for part in parts)
        self._weights: dict[str, Weight | None] = {}
        for name in names:
            if source.module_names:
                found = Weight(name) if name in present else None
            else:
                found = family.stored(name, config, present)
            if found or name.endswith(optional):
                self._weights[name] = found

    def weight(self, name: str) -> Weight | None:
        """Return where a weight is; None for a bias that is zero because none is stored."""
        if name not in self._weights:
            raise self.missing(name)
        return self._weights[name]

    def stored_names(self) -> set[str]:
        """Return the names of the checkpoint's tensors that the module reads."""
        return {weight.name for weight in self._weights.values() if weight is not None}

    def check(self, name: str) -> None:
        """Refuse a weight of a type that is not read."""
        weight = self.weight(name)
        if weight is not None:
            self.source.check(weight.name)

    def names(self) -> list[str]:
        """Return the module's weights that the checkpoint holds."""
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        weight = self.weight(name)
        if weight is None:
            return self.shape(f"{name.removesuffix('.bias')}.weight")[:1]
        return weight.shape(self.source.shape(weight.name))

    def dtype(self, name: str) -> str:
        """Return the stored type."""
        weight = self.weight(name)
        return "f32" if weight is None else self.source.dtype(weight.name)

    def load(self, name: str) -> np.ndarray:
        """Read one weight as float32."""
        weight = self.weight(name)
        if weight is None:
            return np.zeros(self.shape(name), np.float32)
        if weight.index is None:
            array = weight.take(self.source.load(weight.name))
        else:
            array = weight.take(self.source.load_entry(weight.name, weight.index))
        array = array + np.float32(weight.offset) if weight.offset else array
        return array * np.float32(weight.factor) if weight.factor != 1.0 else array

    def load_raw(self, name: str) -> Quantized | None:
        """Return stored codes and scales; None for transposed, shifted or scaled weights."""
        weight = self.weight(name)
        if weight is None or weight.transpose or weight.offset or weight.factor != 1.0:
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
