"""Walk an array in cache-sized blocks of whole groups, with each group's extrema.

    array [..., K] -> rows [R, K] -> blocks [r, G, group_size] of about 2^16 values, zero-padded
                                     where the last group of a row is ragged

Refusing what cannot be quantized (NaN, Inf, too few columns, not numbers) happens here, once for
all formats: NaN and Inf always show in a group's extrema, so the check reads 1/32 of the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from amx_tvm.errors import FormatError

BLOCK_VALUES = 1 << 16
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass
class Block:
    """Some rows and groups of a walk.

    values : [r, G, group_size] in the walked array's type (float32 when quantizing)
    high, depth : float32 [r, G], max(0, largest) and |min(0, smallest)|; only when quantizing
    nan_groups : bool [r, G], or None when there is no NaN
    """

    rows: slice
    columns: slice
    groups: slice
    values: np.ndarray
    high: np.ndarray
    depth: np.ndarray
    nan_groups: np.ndarray | None = None

    def trimmed(self, data: np.ndarray) -> np.ndarray:
        """[r, columns] out of data [r, G, group_size]: the padding of a ragged group cut off."""
        width = self.columns.stop - self.columns.start
        return data.reshape(data.shape[0], -1)[:, :width]


def walk(rows: np.ndarray, group_size: int) -> Iterator[Block]:
    """Blocks of a [R, K] array, padded with zeros to whole groups; without extrema."""
    count, columns = rows.shape
    width = max(BLOCK_VALUES // group_size, 1) * group_size
    step = max(BLOCK_VALUES // columns, 1)  # 1 where a row is cut, so blocks come in C order
    none = np.empty((0, 0), np.float32)
    for top in range(0, count, step):
        bottom = min(top + step, count)
        for left in range(0, columns, width):
            right = min(left + width, columns)
            groups = -(-(right - left) // group_size)
            piece = rows[top:bottom, left:right]
            if groups * group_size != right - left:
                padded = np.zeros((bottom - top, groups * group_size), rows.dtype)
                padded[:, : right - left] = piece
                piece = padded
            first = left // group_size
            yield Block(
                rows=slice(top, bottom),
                columns=slice(left, right),
                groups=slice(first, first + groups),
                values=np.ascontiguousarray(piece).reshape(bottom - top, groups, group_size),
                high=none,
                depth=none,
            )


def extrema(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """max(0, .) and |min(0, .)| over the last axis of float32 [r, G, g]; NaN propagates.

    Never -0: a negative zero would reach the stored scales.

    A transposed copy turns two short reductions, for which NumPy pays a call each (1.7 ns a value),
    into two long vectorized ones: 0.9 ns for both.
    """
    r, groups, size = values.shape
    turned = values.reshape(r * groups, size).T.copy()
    high = np.maximum.reduce(turned, axis=0, initial=np.float32(0)).reshape(r, groups)
    low = np.minimum.reduce(turned, axis=0, initial=np.float32(0)).reshape(r, groups)
    return high + np.float32(0), np.abs(low)


@dataclass(frozen=True)
class Rows:
    """An array to quantize to a format, seen as rows [R, K], with what may be in it."""

    format_name: str
    group_size: int
    shape: tuple[int, ...]
    values: np.ndarray
    label: str
    allow_inf: bool
    allow_nan: bool

    @property
    def rows(self) -> int:
        """Number of rows R."""
        return self.values.shape[0]

    @property
    def groups(self) -> int:
        """Groups a row."""
        return -(-self.values.shape[1] // self.group_size)

    def blocks(self) -> Iterator[Block]:
        """Blocks as float32 with extrema, checked; Inf saturated and NaN zeroed where allowed."""
        for block in walk(self.values, self.group_size):
            with np.errstate(over="ignore", invalid="ignore"):
                values = block.values.astype(np.float32, copy=False)
                high, depth = extrema(values)
            if not (np.isfinite(high).all() and np.isfinite(depth).all()):
                self._refuse(block, values)
                block.nan_groups = np.isnan(high)
                values = np.nan_to_num(
                    values, nan=0.0, posinf=LARGEST_FLOAT32, neginf=-LARGEST_FLOAT32
                )
                high, depth = extrema(values)
                if not block.nan_groups.any():
                    block.nan_groups = None
            block.values, block.high, block.depth = values, high, depth
            yield block

    def largest(self) -> np.ndarray:
        """float32 largest magnitude: [1, 1] for weights, [R, 1] for activations (Inf allowed)."""
        found = np.zeros((self.rows, 1), np.float32)
        for block in self.blocks():
            magnitude = np.maximum(block.high.max(axis=1), block.depth.max(axis=1))
            np.maximum(found[block.rows, 0], magnitude, out=found[block.rows, 0])
        return found if self.allow_inf else found.max(axis=0, keepdims=True)

    def _refuse(self, block: Block, values: np.ndarray) -> None:
        bad = np.isnan(values) if self.allow_inf else ~np.isfinite(values)
        if self.allow_nan or not bad.any():
            return
        row, group, place = (int(i) for i in np.argwhere(bad)[0])
        column = block.columns.start + group * self.group_size + place
        lead = np.unravel_index(block.rows.start + row, self.shape[:-1]) if self.shape[:-1] else ()
        index = (*(int(i) for i in lead), column)
        raise FormatError(
            f"{self.label} holds {values[row, group, place]} at index {index}, but format "
            f"{self.format_name} has finite values only; repair or replace the checkpoint"
        )


def rows_of(
    format_name: str,
    group_size: int,
    array: np.ndarray,
    name: str | None,
    activation: bool,
    allow_nan: bool = False,
) -> Rows:
    """View an array [..., K] as rows, refusing what cannot be grouped."""
    array = np.asarray(array)
    label = f"tensor {name!r}" if name else "the array"
    # ml_dtypes' bfloat16 has kind "V" and a dtype of its own; a plain void has no arithmetic.
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise FormatError(f"{label} has type {array.dtype}; a real array was expected")
    if array.ndim == 0 or array.size == 0:
        raise FormatError(f"{label} has shape {array.shape}; at least one value along K is needed")
    columns = array.shape[-1]
    if columns < group_size and not activation:
        raise FormatError(
            f"{label} has {columns} columns, but format {format_name} groups {group_size} values "
            "along the last axis; leave this tensor unquantized"
        )
    rows = array.reshape(-1, columns)
    return Rows(format_name, group_size, array.shape, rows, label, activation, allow_nan)


def per_row(scale: np.ndarray | None, lead: tuple[int, ...]) -> np.ndarray | None:
    """A tensor scale of shape [] or `lead` as float32 [R, 1]; None stays None."""
    if scale is None:
        return None
    if scale.shape not in ((), lead):
        raise FormatError(f"a tensor scale has shape {scale.shape}; () or {lead} was expected")
    rows = int(np.prod(lead, dtype=np.int64))
    return np.broadcast_to(scale.reshape(-1, 1).astype(np.float32, copy=False), (rows, 1))
