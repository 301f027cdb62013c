"""The data around a number format: quantized arrays, scale tensors and decode terms.

Plain frozen records; what makes and reads them is `base.Format`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from amx_tvm.errors import FormatError
from amx_tvm.formats.blocks import per_row
from amx_tvm.formats.scales import ScaleType

if TYPE_CHECKING:
    from amx_tvm.formats.base import Format


@dataclass(frozen=True)
class ScaleTensor:
    """One stored scale a group: its name within the format and its stored type."""

    name: str
    type: ScaleType = field(repr=False)

    @property
    def dtype(self) -> str:
        """NumPy name of the storage type."""
        return self.type.dtype

    @property
    def bytes(self) -> int:
        """Bytes of one stored scale."""
        return self.type.bytes


@dataclass(frozen=True)
class DecodeTerm:
    """One summand of the decode: ``factor * scale * (table[code] - offset)``.

    `table` has 16 entries of 0..127, or is None where the byte itself is the number. `scale` names
    a scale tensor. `offset` is an integer, or the name of a scale tensor that holds a zero point.
    """

    table: tuple[int, ...] | None
    scale: str
    factor: float
    offset: int | str


@dataclass(frozen=True)
class Quantized:
    """A quantized array.

    codes : uint8, the array's shape [..., K], one code a byte
    scales : name -> stored scales [..., ceil(K / group_size)]
    format : the format that made it
    tensor_scale : None, or float32 of shape [] (weights) or [...] (one a row of K values)
    """

    codes: np.ndarray
    scales: dict[str, np.ndarray]
    format: Format
    tensor_scale: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that was quantized."""
        return self.codes.shape


def concatenate(parts: list[Quantized]) -> Quantized:
    """Stack quantized matrices [N_i, K] of one format along their rows (merged projections).

    A tensor scale becomes one float32 a row, so that each part keeps its own.
    """
    fmt, columns = parts[0].format, parts[0].shape[-1]
    for part in parts:
        if part.format.name != fmt.name or part.shape[1:] != (columns,):
            raise FormatError(
                f"a {part.format.name} matrix of shape {part.shape} cannot be stacked under a "
                f"{fmt.name} one with {columns} columns; formats and columns must agree"
            )
    scale: np.ndarray | None = None
    if fmt.row_scaled:
        given = [per_row(part.tensor_scale, part.shape[:1]) for part in parts]
        scale = np.concatenate([rows for rows in given if rows is not None])[:, 0]
    return Quantized(
        np.concatenate([part.codes for part in parts]),
        {s.name: np.concatenate([p.scales[s.name] for p in parts]) for s in fmt.scale_tensors},
        fmt,
        scale,
    )
