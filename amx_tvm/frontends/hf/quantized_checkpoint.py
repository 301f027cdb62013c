"""Hugging Face directories whose weights are 4-bit already: codes and scales pass through.

:mod:`amx_tvm.frontends.hf.quantized_layouts` finds the tensors; docs/checkpoints.md describes the
layout that ``amx-tvm quantize`` writes and reads it in 40 lines.
"""

from __future__ import annotations

import os
from math import prod
from typing import Any

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.formats import Quantized
from amx_tvm.frontends.base import ModelSource
from amx_tvm.frontends.hf.quantized_layouts import METHOD, UNUSED, Stored, layout_of

HEAD = "lm_head.weight"


def reads(config: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` is of a layout that is read here."""
    return layout_of(config) is not None


class QuantizedCheckpoint(ModelSource):
    """A checkpoint directory under the names of the unquantized model.

    Parameters
    ----------
    source : HuggingFaceSource
        The directory as its files name the tensors.

    Raises
    ------
    ModelError
        When a weight lacks one of its scales, or a format is unknown.
    """

    def __init__(self, source: Any) -> None:
        self.source, self.name = source, source.name
        self.generation_config = source.generation_config
        self.config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        quantization = source.config["quantization_config"]
        layout = layout_of(quantization)
        assert layout is not None, quantization  # read_config has refused it
        self._quantized: dict[str, Stored] = layout(source, quantization)
        stored = source.names()
        parts = {part for entry in self._quantized.values() for part in entry.parts}
        for part in sorted(parts - set(stored)):
            raise ModelError(f"{source.name} lacks the tensor {part!r} of a quantized weight")
        unused: tuple[str, ...] = UNUSED
        if quantization.get("quant_method") == METHOD:
            tied = self.config["tie_word_embeddings"] = quantization.get(
                "tie_word_embeddings", False
            )
            # Older checkpoints keep a tied head beside the quantized embedding.
            unused += (HEAD,) if tied else ()
        plain = [n for n in stored if n not in parts and not n.endswith(unused)]
        self._names = [*plain, *self._quantized]

    def names(self) -> list[str]:
        """Return the names of all weights."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        if name not in self._quantized:
            return self.source.shape(name)
        entry = self._quantized[name]
        return self._unpacked(entry, self.source.shape(entry.codes))

    @staticmethod
    def _unpacked(entry: Stored, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in values of stored codes."""
        rows, columns = (shape[:-2], shape[-2:]) if entry.blocks else (shape[:-1], shape[-1:])
        return (*rows, prod(columns) * (2 if entry.format.code_bits == 4 else 1))

    def dtype(self, name: str) -> str:
        """Return the stored type or the number format."""
        if name in self._quantized:
            return self._quantized[name].format.name
        return self.source.dtype(name)

    def check(self, name: str) -> None:
        """Refuse a weight that is neither quantized nor of 16 or more bits."""
        if name not in self._quantized:
            self.source.check(name)

    def same(self, first: str, second: str) -> bool:
        """Return whether two weights are stored alike; a quantized one is like no other."""
        plain = first not in self._quantized and second not in self._quantized
        return plain and self.source.same(first, second)

    def load_raw(self, name: str) -> Quantized | None:
        """Return the stored codes and scales of a quantized weight."""
        return self._raw(name, None)

    def load_raw_entry(self, name: str, index: int) -> Quantized | None:
        """Return the stored codes and scales of one entry of a stack."""
        return self._raw(name, index)

    def _raw(self, name: str, index: int | None) -> Quantized | None:
        if name not in self._quantized:
            return None
        entry = self._quantized[name]
        fmt, codes = entry.format, self.source.stored(entry.codes, index)
        shape = self._unpacked(entry, codes.shape)
        if fmt.code_bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1)
        tensor: np.ndarray | None = None
        if fmt.row_scaled:
            tensor = np.ones((), np.float32)
            if entry.tensor:
                given = self.source.load(entry.tensor).reshape(())
                tensor = np.asarray(tensor / given if entry.divide else given, np.float32)
        types = {scale.name: scale.dtype for scale in fmt.scale_tensors}
        scales = {
            key: self.source.stored(stored, index).view(types[key])
            for key, stored in entry.scales.items()
        }
        for key, scale in scales.items():
            fmt.scale_tensor(key).type.check(scale, f"the scales of {name} in {self.name}")
        return Quantized(codes.reshape(shape), scales, fmt, tensor)

    def load(self, name: str) -> np.ndarray:
        """Read one weight as float32."""
        raw = self.load_raw(name)
        return self.source.load(name) if raw is None else raw.format.dequantize(raw)

    def load_entry(self, name: str, index: int) -> np.ndarray:
        """Read one entry of a stacked weight as float32."""
        raw = self.load_raw_entry(name, index)
        return self.source.load_entry(name, index) if raw is None else raw.format.dequantize(raw)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return self.source.nbytes

    def write_tokenizer(self, directory: str | os.PathLike[str]) -> list[str]:
        """Copy the tokenizer."""
        return self.source.write_tokenizer(directory)

    def digest(self) -> str:
        """Return the identity of the checkpoint."""
        return self.source.digest()
