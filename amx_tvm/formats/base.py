"""What a number format is: `Format`, its quantize and dequantize, and how kernels decode it.

A format cuts the last axis K into groups of `group_size`; a ragged last group behaves as if padded
with zeros. Every value has a code of 4 or 8 bits, every group one or two stored scales, and some
formats one float32 for the tensor (weights) or for each row (activations). For code c of group g

    value = tensor_scale * sum over terms of  factor * scale[term.scale][g] * (table[c] - offset)

with small unsigned tables. That sum is exact in float32 before the tensor scale enters, so every
kernel that evaluates the same terms decodes the same weights.

A format implements `group_scales` and `encode`; everything else follows from its terms. All work
goes over blocks of groups that stay in a core's L2 cache, so memory beyond the result is bounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from amx_tvm.errors import FormatError
from amx_tvm.formats import blocks
from amx_tvm.formats.data import DecodeTerm, Quantized, ScaleTensor
from amx_tvm.formats.scale_rules import ScaleRule


class Format(ABC):
    """A number format; instances are immutable and registered by name (see `registry`)."""

    name: str
    title: str  # half a line for tables
    group_size: int = 32
    code_bits: int = 4
    scale_tensors: tuple[ScaleTensor, ...]
    terms: tuple[DecodeTerm, ...]
    row_scaled: bool = False
    rule: ScaleRule | None = None  # how scales of E2M1 elements are made; None for other elements
    four_over_six: bool = False  # the better of two scales is chosen, see that file

    def rounding_of(self, what: str) -> ScaleRule:
        """How scales are made, for kernels that round ``what`` to this format.

        Raises
        ------
        FormatError
            For a format of other elements than E2M1.
        """
        if self.rule is None:
            raise FormatError(
                f"{what} cannot be quantized to {self.name!r}: only formats of E2M1 elements have "
                "a kernel for it (amxfp4, mxfp4, nvfp4 and their variants)"
            )
        return self.rule

    @property
    def bits_per_value(self) -> float:
        """Stored bits a value with group scales, without a tensor scale (32 bits a tensor)."""
        return self.code_bits + 8 * sum(s.bytes for s in self.scale_tensors) / self.group_size

    @property
    def zero_code(self) -> int | str:
        """The code of value 0, or the name of the zero-point scale tensor that holds it."""
        term = self.terms[0]
        if isinstance(term.offset, str):
            return term.offset
        return term.offset if term.table is None else term.table.index(term.offset)

    def scale_tensor(self, name: str) -> ScaleTensor:
        """Look up one of the format's scale tensors."""
        for tensor in self.scale_tensors:
            if tensor.name == name:
                return tensor
        known = ", ".join(tensor.name for tensor in self.scale_tensors)
        raise FormatError(f"format {self.name} has no scale tensor {name!r}; it has: {known}")

    def decode_scale(self, name: str, stored: np.ndarray) -> np.ndarray:
        """float32 values of stored scales of the scale tensor `name`."""
        return self.scale_tensor(name).type.decode(stored)

    def decode_scale_tir(self, name: str, stored: Any) -> Any:
        """TIR twin of `decode_scale`, for scalars and vectors of any lanes.

        Parameters
        ----------
        name : the scale tensor
        stored : PrimExpr of its storage type (uint8, float16; for float16 also its bits as uint16)

        Returns
        -------
        float32 PrimExpr of the same lanes, equal to `decode_scale` bit for bit.
        """
        return self.scale_tensor(name).type.decode_tir(stored)

    @abstractmethod
    def group_scales(
        self, high: np.ndarray, depth: np.ndarray, tensor_scale: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Stored scales of groups from their extrema.

        Parameters
        ----------
        high, depth : float32 [R, G] >= +0, max(0, largest) and |min(0, smallest)| of each group
        tensor_scale : float32 [R, 1], or None for formats without one

        Returns
        -------
        dict of stored arrays [R, G], one for each scale tensor.
        """

    @abstractmethod
    def encode(
        self,
        values: np.ndarray,
        scales: Mapping[str, np.ndarray],
        tensor_scale: np.ndarray | None = None,
    ) -> np.ndarray:
        """Codes of float32 values [R, G, group_size] under given stored scales [R, G].

        Public because calibrated recipes choose the scales themselves. `tensor_scale` is [R, 1].
        """

    def tensor_scale_of(self, largest: np.ndarray) -> np.ndarray:
        """float32 tensor scale for a largest magnitude; only formats with `row_scaled` have one."""
        raise FormatError(f"format {self.name} has no tensor scale")

    def decode(
        self,
        codes: np.ndarray,
        scales: Mapping[str, np.ndarray],
        tensor_scale: np.ndarray | None = None,
    ) -> np.ndarray:
        """float32 values of codes [R, G, group_size] and stored scales [R, G], by the terms."""
        total: np.ndarray | None = None
        for term in self.terms:
            if term.table is None:
                number = codes.astype(np.float32)
            else:
                number = np.take(np.asarray(term.table, np.float32), codes)
            if isinstance(term.offset, str):
                number -= self.decode_scale(term.offset, scales[term.offset])[..., None]
            elif term.offset:
                number -= np.float32(term.offset)
            scale = self.decode_scale(term.scale, scales[term.scale]) * np.float32(term.factor)
            number *= scale[..., None]
            total = number if total is None else np.add(total, number, out=total)
        assert total is not None
        if tensor_scale is not None:
            total *= tensor_scale[..., None]
        return np.add(total, np.float32(0), out=total)  # -0 becomes +0

    def quantize(
        self,
        array: np.ndarray,
        *,
        name: str | None = None,
        activation: bool = False,
        tensor_scale: np.ndarray | float | None = None,
    ) -> Quantized:
        """Quantize an array [..., K] of any real type along its last axis.

        Parameters
        ----------
        array : real array; values are read as float32
        name : what error messages call it
        activation : Inf saturates, K may be smaller than a group, and a tensor scale is one a row;
            without it (weights) Inf is refused, K must fill a group, and a tensor scale is one
            for the whole array. NaN has no code and is refused by both.
        tensor_scale : float32 of shape [] or array.shape[:-1] to use instead of the format's own

        Raises
        ------
        FormatError
            NaN or Inf (with its first index), K smaller than a group, not a real array.
        """
        source = blocks.rows_of(self.name, self.group_size, array, name, activation)
        scale = self._row_scales(source, tensor_scale)
        codes = np.empty(source.values.shape, np.uint8)
        groups = (source.rows, source.groups)
        stored = {s.name: np.empty(groups, s.dtype) for s in self.scale_tensors}
        for block in source.blocks():
            row_scale = None if scale is None else scale[block.rows]
            parts, block_codes = self._quantize_block(block, row_scale)
            codes[block.rows, block.columns] = block.trimmed(block_codes)
            for key, part in parts.items():
                stored[key][block.rows, block.groups] = part
        lead = source.shape[:-1]
        return Quantized(
            codes.reshape(source.shape),
            {key: value.reshape(*lead, source.groups) for key, value in stored.items()},
            self,
            self._shaped_scale(scale, lead, activation, tensor_scale),
        )

    def dequantize(self, quantized: Quantized) -> np.ndarray:
        """float32 array of the quantized array's shape; reserved scale bytes raise FormatError."""
        shape, size = quantized.codes.shape, self.group_size
        columns = shape[-1]
        for tensor in self.scale_tensors:
            tensor.type.check(quantized.scales[tensor.name], f"scale tensor {tensor.name!r}")
        codes = quantized.codes.reshape(-1, columns)
        groups = -(-columns // size)
        stored = {k: v.reshape(-1, groups) for k, v in quantized.scales.items()}
        scale = blocks.per_row(quantized.tensor_scale, shape[:-1])
        out = np.empty(codes.shape, np.float32)
        for block in blocks.walk(codes, size):
            row_scale = None if scale is None else scale[block.rows]
            part = {k: v[block.rows, block.groups] for k, v in stored.items()}
            out[block.rows, block.columns] = block.trimmed(
                self.decode(block.values, part, row_scale)
            )
        return out.reshape(shape)

    def quantize_dequantize(
        self, array: np.ndarray, *, name: str | None = None, activation: bool = False
    ) -> np.ndarray:
        """``dequantize(quantize(array))`` in one pass, without storing codes (fake quantization).

        With `activation`, NaN is allowed too and makes its group NaN.
        """
        source = blocks.rows_of(
            self.name, self.group_size, array, name, activation, allow_nan=activation
        )
        scale = self._row_scales(source, None)
        out = np.empty(source.values.shape, np.float32)
        for block in source.blocks():
            row_scale = None if scale is None else scale[block.rows]
            stored, codes = self._quantize_block(block, row_scale)
            values = self.decode(codes, stored, row_scale)
            if block.nan_groups is not None:
                values[block.nan_groups] = np.nan
            out[block.rows, block.columns] = block.trimmed(values)
        return out.reshape(source.shape)

    def _quantize_block(
        self, block: blocks.Block, row_scale: np.ndarray | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        stored = self.group_scales(block.high, block.depth, row_scale)
        return stored, self.encode(block.values, stored, row_scale)

    def _row_scales(
        self, source: blocks.Rows, given: np.ndarray | float | None
    ) -> np.ndarray | None:
        """Tensor scale of every row [R, 1], or None."""
        if not self.row_scaled:
            if given is not None:
                raise FormatError(f"format {self.name} has no tensor scale, but one was given")
            return None
        if given is not None:
            return blocks.per_row(np.asarray(given, np.float32), source.shape[:-1])
        scale = self.tensor_scale_of(source.largest())
        return np.broadcast_to(scale, (source.rows, 1))

    @staticmethod
    def _shaped_scale(
        scale: np.ndarray | None,
        lead: tuple[int, ...],
        activation: bool,
        given: np.ndarray | float | None,
    ) -> np.ndarray | None:
        if scale is None:
            return None
        if given is not None:
            return np.array(given, np.float32)
        return scale.reshape(lead).copy() if activation else scale[0, 0].reshape(())

    def __repr__(self) -> str:
        return f"<Format {self.name}: {self.bits_per_value:g} bits a value>"
