"""Packed layouts of quantized matrices: a registry, the padding they share, and layout "plain".

A layout turns a quantized matrix [N, K] into a few arrays that a kernel reads, and back. One file
registers one layout; the kernels that read it live elsewhere and name it.

    layout "plain": codes  uint8 [N, ceil(K/32), 16]   two codes a byte, even k in the low nibble
                           uint8 [N, ceil(K/32), 32]   for 8-bit formats
                    scales uint8 [N, ceil(K/32), S]    every scale tensor in order, then the
                                                       sub-groups of the 32 columns, little endian
                    row_scale float32 [N]              only for formats with a tensor scale

Padding columns hold the code of value 0 (128 for int8, the group's zero point for int4), padding
rows and groups have scale 0: whatever a kernel multiplies them with, they add nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from amx_tvm.errors import FormatError
from amx_tvm.formats.base import Format
from amx_tvm.formats.blocks import per_row
from amx_tvm.formats.data import Quantized
from amx_tvm.formats.registry import get

COLUMNS = 32  # every layout is made of 32-column units, whatever the format's group size
TILE_ROWS = 16  # rows of a tile, in layouts that have tiles

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Layout:
    """A packed layout.

    pack : (format, quantized matrix) -> named arrays
    unpack : (format, named arrays, N, K) -> quantized matrix
    shapes : (format, N, K) -> name -> (shape, dtype) of what `pack` makes
    quantized : False for layouts of matrices of floats, whose format is None
    compute : what the layout's kernels compute in, the type of x
    floats : the layout of such matrices that the same kernels read; "" where there is none
    e4m3 : the layout of weights that are multiplied as E4M3; "" where there is none
    columns : K is a multiple of this
    rows_readable : kernels look single rows up, as embeddings do
    takes : whether a format's matrices can be packed so
    """

    name: str
    pack: Callable[[Any, Any], Arrays]
    unpack: Callable[[Any, Mapping[str, np.ndarray], int, int], Any]
    shapes: Callable[[Any, int, int], Shapes]
    quantized: bool = True
    compute: str = "float32"
    floats: str = ""
    e4m3: str = ""
    columns: int = 1
    rows_readable: bool = False
    takes: Callable[[Any], bool] = lambda _format: True

    def holds(self, k: int, dtype: str) -> bool:
        """Whether kernels multiply a matrix of K columns in this layout to a type."""
        return k % self.columns == 0 and dtype == self.compute


_LAYOUTS: dict[str, Layout] = {}


def register_layout(layout: Layout) -> Layout:
    """Add a layout under its name and return it; a name can be taken once."""
    if layout.name in _LAYOUTS:
        raise ValueError(f"packed layout {layout.name!r} is registered twice")
    _LAYOUTS[layout.name] = layout
    return layout


def layouts(fmt: str | Format) -> list[str]:
    """Names of the registered layouts of a format's quantized matrices."""
    fmt = get(fmt)
    return [name for name, layout in _LAYOUTS.items() if layout.quantized and layout.takes(fmt)]


def get_layout(name: str) -> Layout:
    """Look up a layout by name; FormatError lists the known ones."""
    if name not in _LAYOUTS:
        raise FormatError(f"unknown packed layout {name!r}; choose one of: {', '.join(_LAYOUTS)}")
    return _LAYOUTS[name]


def pack(fmt: str | Format, quantized: Quantized, layout: str = "plain") -> Arrays:
    """Arrays of a quantized matrix [N, K] in a layout: "codes", "scales" and maybe a tensor scale.

    Raises FormatError for an unknown layout or one of other formats, a matrix that is not 2-D,
    another format's data, or a scale byte that is never written.
    """
    fmt = get(fmt)
    if quantized.codes.ndim != 2:
        raise FormatError(f"only matrices can be packed; the codes have shape {quantized.shape}")
    if quantized.format.name != fmt.name:
        raise FormatError(f"data of format {quantized.format.name} cannot be packed as {fmt.name}")
    _check_scales(fmt, quantized)
    if not get_layout(layout).takes(fmt):
        raise FormatError(
            f"layout {layout} does not hold {fmt.name}; its layouts are: {', '.join(layouts(fmt))}"
        )
    # A concatenation of transposed views keeps their order of axes: make all arrays C-ordered.
    arrays = get_layout(layout).pack(fmt, quantized)
    return {key: np.ascontiguousarray(array) for key, array in arrays.items()}


def unpack(
    fmt: str | Format, arrays: Mapping[str, np.ndarray], layout: str, n: int, k: int
) -> Quantized:
    """Inverse of `pack` for a matrix of true size n x k; refuses scales that are never written."""
    fmt = get(fmt)
    expected = get_layout(layout).shapes(fmt, n, k)
    for key, (shape, dtype) in expected.items():
        found = arrays.get(key)
        if found is None or found.shape != shape or found.dtype != dtype:
            got = "nothing" if found is None else f"{found.dtype} {found.shape}"
            raise FormatError(
                f"layout {layout} of a {n} x {k} {fmt.name} matrix holds {key} as {dtype} {shape}; "
                f"got {got}"
            )
    quantized = get_layout(layout).unpack(fmt, arrays, n, k)
    _check_scales(fmt, quantized)
    return quantized


def pack_floats(matrix: np.ndarray, layout: str) -> Arrays:
    """Arrays of a float32 matrix [N, K] in a layout of such."""
    return {k: np.ascontiguousarray(a) for k, a in get_layout(layout).pack(None, matrix).items()}


def unpack_floats(arrays: Mapping[str, np.ndarray], layout: str, n: int, k: int) -> np.ndarray:
    """Inverse of `pack_floats` for a matrix of true size n x k."""
    return get_layout(layout).unpack(None, arrays, n, k)


def part_shapes(fmt: str | Format, shape: tuple[int, int], layout: str = "plain") -> Shapes:
    """Name -> (shape, dtype) of the arrays that `pack` makes of a matrix of shape (N, K).

    Format "none" is a float32 matrix in a layout of such.
    """
    return get_layout(layout).shapes(None if fmt == "none" else get(fmt), *shape)


def _check_scales(fmt: Format, quantized: Quantized) -> None:
    for tensor in fmt.scale_tensors:
        tensor.type.check(quantized.scales[tensor.name], f"scale tensor {tensor.name!r}")


def subgroups(fmt: Format) -> int:
    """Groups of a format in one 32-column unit."""
    return COLUMNS // fmt.group_size


def scale_bytes(fmt: Format) -> int:
    """Scale bytes of one row in one 32-column unit."""
    return subgroups(fmt) * sum(tensor.bytes for tensor in fmt.scale_tensors)


def padded_codes(fmt: Format, quantized: Quantized, rows: int) -> np.ndarray:
    """uint8 [rows, units * 32]: the codes, padded with the code of value 0."""
    n, k = quantized.shape
    columns = -(-k // COLUMNS) * COLUMNS
    if (n, k) == (rows, columns):
        return np.ascontiguousarray(quantized.codes)
    zero = fmt.zero_code
    codes = np.full((rows, columns), 0 if isinstance(zero, str) else zero, np.uint8)
    if isinstance(zero, str):
        codes[:n, k:] = quantized.scales[zero][:, -1:]
    codes[:n, :k] = quantized.codes
    return codes


def padded_scales(fmt: Format, quantized: Quantized, rows: int) -> list[np.ndarray]:
    """For each scale tensor uint8 [rows, units, subgroups, bytes], zero where padded."""
    n, k = quantized.shape
    units, sub = -(-k // COLUMNS), subgroups(fmt)
    out = []
    for tensor in fmt.scale_tensors:
        stored = quantized.scales[tensor.name]
        whole = np.zeros((rows, units * sub), np.dtype(tensor.dtype).newbyteorder("<"))
        whole[:n, : stored.shape[1]] = stored
        out.append(whole.view(np.uint8).reshape(rows, units, sub, tensor.bytes))
    return out


def restored(
    fmt: Format,
    codes: np.ndarray,
    parts: list[np.ndarray],
    row_scale: np.ndarray | None,
    n: int,
    k: int,
) -> Quantized:
    """A quantized n x k matrix from padded codes and `padded_scales` arrays."""
    groups = -(-k // fmt.group_size)
    scales = {}
    for tensor, part in zip(fmt.scale_tensors, parts, strict=True):
        flat = np.ascontiguousarray(part).reshape(part.shape[0], -1)
        stored = flat.view(np.dtype(tensor.dtype).newbyteorder("<")).astype(tensor.dtype)
        scales[tensor.name] = np.ascontiguousarray(stored[:n, :groups])
    scale = None if row_scale is None else np.ascontiguousarray(row_scale[:n])
    return Quantized(np.ascontiguousarray(codes[:n, :k]), scales, fmt, scale)


def padded_row_scale(fmt: Format, quantized: Quantized, rows: int) -> Arrays:
    """{"row_scale": float32 [rows]} for formats with a tensor scale, else {}."""
    if not fmt.row_scaled:
        return {}
    scale = np.zeros(rows, np.float32)
    given = per_row(quantized.tensor_scale, quantized.shape[:1])
    if given is None:
        raise FormatError(f"format {fmt.name} needs a tensor scale, but the data has none")
    scale[: quantized.shape[0]] = given[:, 0]
    return {"row_scale": scale}


def row_scale_shape(fmt: Format, rows: int) -> Shapes:
    """Shape entry of `padded_row_scale`."""
    return {"row_scale": ((rows,), "float32")} if fmt.row_scaled else {}


def tile_scale(fmt: Format, quantized: Quantized) -> Arrays:
    """{"tile_scale": float32 [ceil(N/16)]} for formats with a tensor scale, else {}.

    One float32 for 16 rows lets merged projections keep each part's own, in 2/K bits a weight.
    Raises FormatError where the rows of one tile have different scales: parts of a merged matrix
    whose rows are no multiple of 16.
    """
    if not fmt.row_scaled:
        return {}
    rows = -(-quantized.shape[0] // TILE_ROWS) * TILE_ROWS
    by_row = padded_row_scale(fmt, quantized, rows)["row_scale"].reshape(-1, TILE_ROWS)
    scale = np.ascontiguousarray(by_row[:, 0])
    same = by_row == scale[:, None]
    if not same.reshape(-1)[: quantized.shape[0]].all():
        tile = int(np.flatnonzero(~same.all(axis=1))[0])
        raise FormatError(
            f"rows {tile * TILE_ROWS} to {tile * TILE_ROWS + TILE_ROWS - 1} of a {fmt.name} matrix "
            "have different tensor scales, but a tile of 16 rows has one; stack parts whose rows "
            "are multiples of 16"
        )
    return {"tile_scale": scale}


def tile_scale_shape(fmt: Format, n: int) -> Shapes:
    """Shape entry of `tile_scale`."""
    return {"tile_scale": ((-(-n // TILE_ROWS),), "float32")} if fmt.row_scaled else {}


def rows_of_tiles(arrays: Mapping[str, np.ndarray], n: int) -> np.ndarray | None:
    """float32 [N]: the tensor scale of every row out of `tile_scale`'s array, if there is one."""
    return np.repeat(arrays["tile_scale"], TILE_ROWS)[:n] if "tile_scale" in arrays else None


def _pack_plain(fmt: Format, quantized: Quantized) -> Arrays:
    n = quantized.shape[0]
    codes = padded_codes(fmt, quantized, n)
    if fmt.code_bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    units = -(-quantized.shape[1] // COLUMNS)
    parts = [part.reshape(n, units, -1) for part in padded_scales(fmt, quantized, n)]
    return {
        "codes": codes.reshape(n, units, -1),
        "scales": np.concatenate(parts, axis=2),
        **padded_row_scale(fmt, quantized, n),
    }


def _unpack_plain(fmt: Format, arrays: Mapping[str, np.ndarray], n: int, k: int) -> Quantized:
    units, sub = -(-k // COLUMNS), subgroups(fmt)
    codes = arrays["codes"].reshape(n, -1)
    if fmt.code_bits == 4:
        codes = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=2).reshape(n, -1)
    widths = [sub * tensor.bytes for tensor in fmt.scale_tensors]
    cuts = np.split(arrays["scales"], np.cumsum(widths)[:-1], axis=2)
    parts = [
        np.ascontiguousarray(cut).reshape(n, units, sub, tensor.bytes)
        for cut, tensor in zip(cuts, fmt.scale_tensors, strict=True)
    ]
    return restored(fmt, codes, parts, arrays.get("row_scale"), n, k)


def _shapes_plain(fmt: Format, n: int, k: int) -> Shapes:
    units = -(-k // COLUMNS)
    return {
        "codes": ((n, units, COLUMNS * fmt.code_bits // 8), "uint8"),
        "scales": ((n, units, scale_bytes(fmt)), "uint8"),
        **row_scale_shape(fmt, n),
    }


register_layout(Layout("plain", _pack_plain, _unpack_plain, _shapes_plain))
