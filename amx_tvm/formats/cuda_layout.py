"""Packed layout "cuda-fragment": weights in the register order of the tensor cores' A operand.

A tile is 16 rows of W. A *unit* is what one 16-byte load a lane of a warp brings: 16 rows x 64
columns of a 4-bit format, x 32 of an 8-bit one, x 16 of float16. Lane ``4 g + t`` (g = 0..7, t =
0..3) holds, for each step of 16 columns, the four register pairs of mma.m16n8k16 (and of one
warp's part of wgmma.m64nNk16), so a load needs no shared memory, no ldmatrix and no shuffle before
the product:

    pair i = 2 * kh + h      row g + 8 h,   columns 2 t + 8 kh + {0, 1}  (element e = 0, 1)

Words of 32 bits, element e in the half at bit 16 e, word j of a lane:

    E2M1    word j is step j; pair i: magnitude at bits 16 e + 9 - 3 i (three bits), sign at bit
            16 e + 15 - i. A shift by 3 i and by i puts magnitude and sign at a float16's place:
            the value times 2^-14.
    nibbles word j is step j; the E2M1 code of pair i at bits 16 e + 4 (2 h + kh): a byte is of one
            row, so that a table of eight bytes is looked up for four codes at once (layout
            "cuda-fragment-e4m3", formats/e4m3.py)
    int4    word j is step j; pair i: the code at bits 16 e + 4 i (four bits)
    int8    word 2 s + kh is half of step s; the byte of pair i at bits 8 (2 h + e)
    float16 word i is pair i

Scales: for each tile and unit, for each g, for each group of the unit, for h = 0, 1: the stored
scales of row g + 8 h in the format's order (zero points as float16). The pair of groups (2 t, 2 t +
1) that a lane of the block-diagonal schedule needs therefore lies side by side.

    codes      uint8 [N / 16, K / unit, 512]
    scales     uint8 [N / 16, K / unit, 8 * groups * 2 * bytes]
    tile_scale float32 [N / 16], only for formats with a tensor scale

Rows are padded to 16 and columns to whole units (and to 32) with zeros of scale zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amx_tvm.errors import FormatError
from amx_tvm.formats.data import Quantized
from amx_tvm.formats.packing import (
    TILE_ROWS,
    Layout,
    padded_codes,
    register_layout,
    rows_of_tiles,
    tile_scale,
    tile_scale_shape,
)

LANE_BYTES = 16

# Largest scale that the schedules for M > 8 hold in a float16 register, see `check_range`.
LARGEST_SCALE = {"E5M2": 448.0, "E8M0": 128.0, "float16": 500.0}


@dataclass(frozen=True)
class FragmentShape:
    """Sizes of the packed tensors of a weight of N rows and K columns.

    element : "e2m1", "nibbles", "int4", "int8" or "float16"
    bits : bits of a code
    group : values under one scale; 0 for float16
    scale_types : names of the stored scale types, in order
    """

    element: str
    bits: int
    group: int
    scale_types: tuple[str, ...]

    @property
    def unit(self) -> int:
        """Columns that one 16-byte load a lane covers."""
        return 256 // self.bits

    @property
    def unit_groups(self) -> int:
        """Scale groups of a unit."""
        return self.unit // self.group if self.group else 0

    @property
    def scale_bytes(self) -> int:
        """Bytes of all scales of one row and group; zero points take two."""
        return sum(1 if t.startswith("E") else 2 for t in self.scale_types)

    @property
    def record(self) -> int:
        """Bytes of the scales of rows g and g + 8 in one unit."""
        return self.unit_groups * 2 * self.scale_bytes

    def tiles(self, n: int) -> int:
        """Row tiles, the last one padded."""
        return -(-n // TILE_ROWS)

    def units(self, k: int) -> int:
        """Units of columns; K is padded to whole units and to 32."""
        columns = max(self.unit, 32)
        return -(-k // columns) * columns // self.unit

    def codes_shape(self, n: int, k: int) -> tuple[int, int, int]:
        """Shape of the codes, uint8."""
        return (self.tiles(n), self.units(k), 32 * LANE_BYTES)

    def scales_shape(self, n: int, k: int) -> tuple[int, int, int]:
        """Shape of the scales, uint8."""
        return (self.tiles(n), self.units(k), 8 * self.record)


def element_of(fmt) -> str:
    """Which bit order a format's codes take: by the terms that decode them."""
    if fmt.code_bits == 8:
        return "int8"
    return "int4" if isinstance(fmt.terms[0].offset, str) else "e2m1"


def shape_of(fmt, nibbles: bool = False) -> FragmentShape:
    """Sizes for a format of the registry, or for None: plain float16 weights.

    ``nibbles`` asks for the bit order of that name; only formats of E2M1 elements have it.
    """
    if fmt is None:
        return FragmentShape("float16", 16, 0, ())
    types = tuple(s.type.name for s in fmt.scale_tensors)
    element = "nibbles" if nibbles else element_of(fmt)
    return FragmentShape(element, fmt.code_bits, fmt.group_size, types)


def _padded(array: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Pad a 2-D array with zeros."""
    n, k = array.shape
    if (n, k) == (rows, columns):
        return array
    return np.pad(array, ((0, rows - n), (0, columns - k)))


def _fragments(codes: np.ndarray, shape: FragmentShape) -> np.ndarray:
    """View [N, K] codes as [tile, unit, g, t, step, kh, h, e]."""
    tiles, units, steps = codes.shape[0] // 16, codes.shape[1] // shape.unit, shape.unit // 16
    split = codes.reshape(tiles, 2, 8, units, steps, 2, 4, 2)  # tile h g unit step kh t e
    return split.transpose(0, 3, 2, 6, 4, 5, 1, 7)


def _unfragment(split: np.ndarray) -> np.ndarray:
    """Inverse of `_fragments`."""
    tiles, units, _, _, steps = split.shape[:5]
    return split.transpose(0, 6, 2, 1, 4, 5, 3, 7).reshape(tiles * 16, units * steps * 16)


def magnitude_bit(i: int, element: str = "e2m1") -> int:
    """Lowest bit of the magnitude of pair i's element 0 in a word of E2M1."""
    return 9 - 3 * i if element == "e2m1" else nibble_bit(i, element)


def sign_bit(i: int, element: str = "e2m1") -> int:
    """Bit of the sign of pair i's element 0 in a word of E2M1."""
    return 15 - i if element == "e2m1" else nibble_bit(i, element) + 3


def nibble_bit(i: int, element: str = "int4") -> int:
    """Lowest bit of pair i's element 0 in a word of int4, or of E2M1 as nibbles."""
    return 4 * i if element == "int4" else 4 * (2 * (i & 1) + (i >> 1))


def _four_bit_shifts(element: str) -> list[tuple[int, int, int, int]]:
    """List (kh, h, e, shift) of the codes of a word; E2M1's sign has its own place."""
    places = []
    for kh in range(2):
        for h in range(2):
            i = 2 * kh + h
            for e in range(2):
                first = magnitude_bit(i) if element == "e2m1" else nibble_bit(i, element)
                places.append((kh, h, e, 16 * e + first))
    return places


def pack_codes(codes: np.ndarray, shape: FragmentShape) -> np.ndarray:
    """Pack codes uint8 [N, K] (float16 [N, K] for plain weights) to uint8 [tiles, units, 512]."""
    n, k = codes.shape
    tiles, units, _ = shape.codes_shape(n, k)
    split = _fragments(_padded(codes, tiles * 16, units * shape.unit), shape)
    if shape.bits == 4:
        words = np.zeros(split.shape[:5], np.uint32)  # tile unit g t step
        for kh, h, e, shift in _four_bit_shifts(shape.element):
            code = split[..., kh, h, e].astype(np.uint32)
            if shape.element == "e2m1":
                sign = np.uint32(16 * e + sign_bit(2 * kh + h))
                words |= (code >> np.uint32(3)) << sign
                code &= np.uint32(7)
            words |= code << np.uint32(shift)
        packed: np.ndarray = words
    else:
        packed = np.ascontiguousarray(split)  # bytes or halves in the order step kh h e already
    return packed.view(np.uint8).reshape(tiles, units, 512)


def unpack_codes(packed: np.ndarray, shape: FragmentShape, n: int, k: int) -> np.ndarray:
    """Inverse of `pack_codes`."""
    tiles, units, _ = packed.shape
    steps = shape.unit // 16
    outer = (tiles, units, 8, 4, steps)
    split: np.ndarray
    if shape.bits == 4:
        words = np.ascontiguousarray(packed).view(np.uint32).reshape(outer)
        split = np.zeros((*outer, 2, 2, 2), np.uint8)
        for kh, h, e, shift in _four_bit_shifts(shape.element):
            if shape.element == "e2m1":
                sign = np.uint32(16 * e + sign_bit(2 * kh + h))
                split[..., kh, h, e] = (words >> np.uint32(shift)) & np.uint32(7)
                split[..., kh, h, e] |= (((words >> sign) & np.uint32(1)) << np.uint32(3)).astype(
                    np.uint8
                )
            else:
                split[..., kh, h, e] = (words >> np.uint32(shift)) & np.uint32(15)
    else:
        element = np.uint8 if shape.bits == 8 else np.float16
        split = np.ascontiguousarray(packed).view(element).reshape(*outer, 2, 2, 2)
    return np.ascontiguousarray(_unfragment(split)[:n, :k])


def check_range(stored: np.ndarray, scale_type, label: str) -> None:
    """Refuse scales that would overflow a float16 register in the schedules for M > 8.

    Those schedules multiply the codes by the scale in float16, with a factor that keeps every
    product of an E2M1 element and an E5M2 scale exact down to 2^-17. The price is an upper end:
    weights beyond 2688 in magnitude (768 for E8M0), which no trained linear has.
    """
    limit = LARGEST_SCALE.get(scale_type.name)
    if limit is None or not stored.size:
        return
    largest = float(scale_type.decode(stored.max()))
    if largest > limit:
        raise FormatError(
            f"scale {largest:g} of {label} is above {limit:g}, the most that the CUDA kernels "
            "compute with; leave this layer out of the quantization (ignored layers)"
        )


def pack(fmt, quantized, nibbles: bool = False) -> dict[str, np.ndarray]:
    """Pack a 2-D Quantized; see the module docstring for the arrays, `shape_of` for ``nibbles``.

    Raises
    ------
    FormatError
        When a scale is too large for the kernels.
    """
    shape = shape_of(fmt, nibbles)
    n, k = quantized.codes.shape
    tiles, units, _ = shape.codes_shape(n, k)
    columns = []
    for tensor in fmt.scale_tensors:
        stored = np.asarray(quantized.scales[tensor.name])
        check_range(stored, tensor.type, f"{fmt.name}'s scale tensor {tensor.name!r}")
        if tensor.type.name == "zero point":
            stored = stored.astype(np.float16)
        stored = _padded(stored, tiles * 16, units * shape.unit_groups)
        columns.append(np.ascontiguousarray(stored)[..., None].view(np.uint8))
    rows = np.concatenate(columns, axis=-1)  # [N, groups, bytes]
    rows = rows.reshape(tiles, 2, 8, units, shape.unit_groups, shape.scale_bytes)
    scales = rows.transpose(0, 3, 2, 4, 1, 5).reshape(shape.scales_shape(n, k))
    return {
        "codes": pack_codes(padded_codes(fmt, quantized, quantized.shape[0]), shape),
        "scales": np.ascontiguousarray(scales),
        **tile_scale(fmt, quantized),
    }


def unpack(fmt, packed, n: int, k: int, nibbles: bool = False) -> Quantized:
    """Inverse of `pack`."""
    shape = shape_of(fmt, nibbles)
    codes = unpack_codes(packed["codes"], shape, n, k)
    tiles, units, _ = packed["codes"].shape
    split = packed["scales"].reshape(tiles, units, 8, shape.unit_groups, 2, shape.scale_bytes)
    rows = split.transpose(0, 4, 2, 1, 3, 5).reshape(tiles * 16, -1, shape.scale_bytes)
    scales, first, groups = {}, 0, -(-k // fmt.group_size)
    for tensor in fmt.scale_tensors:
        zero_point = tensor.type.name == "zero point"
        dtype = np.dtype(np.float16 if zero_point else tensor.dtype)
        part = np.ascontiguousarray(rows[:n, :groups, first : first + dtype.itemsize])
        first += dtype.itemsize
        stored = part.view(dtype)[..., 0]
        scales[tensor.name] = stored.astype(np.uint8) if zero_point else stored
    return Quantized(codes, scales, fmt, rows_of_tiles(packed, n))


def shapes(fmt, n: int, k: int, nibbles: bool = False) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and types of what `pack`, or without a format `pack_float16`, makes."""
    shape = shape_of(fmt, nibbles)
    codes: dict[str, tuple[tuple[int, ...], str]]
    codes = {"codes": (shape.codes_shape(n, k), "uint8")}
    if fmt is None:
        return codes
    scales = {"scales": (shape.scales_shape(n, k), "uint8")}
    return {**codes, **scales, **tile_scale_shape(fmt, n)}


def pack_float16(weight: np.ndarray) -> dict[str, np.ndarray]:
    """Pack unquantized weights [N, K] of any float type as float16 fragments ("none")."""
    half = np.ascontiguousarray(weight, dtype=np.float16)
    return {"codes": pack_codes(half, shape_of(None))}


def _pack_floats(_fmt: None, matrix: np.ndarray) -> dict[str, np.ndarray]:
    return pack_float16(matrix)


def _unpack_floats(_fmt: None, packed, n: int, k: int) -> np.ndarray:
    return unpack_codes(packed["codes"], shape_of(None), n, k).astype(np.float32)


FLOATS = "cuda-fragment-float16"
register_layout(
    Layout(
        "cuda-fragment",
        pack,
        unpack,
        shapes,
        compute="float16",
        floats=FLOATS,
        e4m3="cuda-fragment-e4m3",  # e4m3.py
        rows_readable=True,
    )
)
register_layout(
    Layout(
        FLOATS,
        _pack_floats,
        _unpack_floats,
        shapes,
        quantized=False,
        compute="float16",
        columns=8,  # 16 bytes of x
    )
)
