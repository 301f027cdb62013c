"""Packed layout "tile16x32": 16 rows x 32 columns a tile, for every CPU kernel.

N is padded to T * 16 rows, K to G * 32 columns. One 32-bit lane of a vector holds one row, so a
512-bit register is 16 rows (256 bits: two halves of 8; 128 bits: four quarters of 4), one 32-bit
broadcast of 4 consecutive activations serves all of them, and no sum crosses lanes.

    codes uint8 [T, G, 256]   4-bit formats: byte v*64 + r*4 + j, v = 0..3, row r = 0..15, j = 0..3
                              low nibble k = 8v + j, high nibble k = 8v + 4 + j

        byte   0: row 0 k 0|4    1: row 0 k 1|5    2: row 0 k 2|6    3: row 0 k 3|7
               4: row 1 k 0|4   ...               63: row 15 k 3|7  64: row 0 k 8|12 ...

    codes uint8 [T, G, 512]   8-bit formats: byte v*64 + r*4 + j holds k = 4v + j, v = 0..7
    scales uint8 [T, G, S]    for each scale tensor, for each sub-group of the 32 columns: 16 rows
                              of its 1 or 2 little-endian bytes (amxfp4: 16 positive, 16 negative)
    tile_scale float32 [T]    only for formats with a tensor scale: y = tile_scale * sum
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from amx_tvm.formats.base import Format
from amx_tvm.formats.data import Quantized
from amx_tvm.formats.packing import (
    COLUMNS,
    TILE_ROWS,
    Arrays,
    Layout,
    Shapes,
    padded_codes,
    padded_scales,
    register_layout,
    restored,
    rows_of_tiles,
    scale_bytes,
    subgroups,
    tile_scale,
    tile_scale_shape,
)

ROWS = TILE_ROWS
HIGH_NIBBLES = np.uint32(0xF0F0F0F0)
LOW_NIBBLES = np.uint32(0x0F0F0F0F)


def _tiles(n: int, k: int) -> tuple[int, int]:
    return -(-n // ROWS), -(-k // COLUMNS)


def _pack(fmt: Format, quantized: Quantized) -> Arrays:
    tiles, units = _tiles(*quantized.shape)
    rows = tiles * ROWS
    # Four neighbouring codes move as one 32-bit word: [T, 16, G, words of 4 k].
    words = padded_codes(fmt, quantized, rows).view("<u4")
    if fmt.code_bits == 4:
        words = words[:, 0::2] | (words[:, 1::2] << np.uint32(4))
    words = words.reshape(tiles, ROWS, units, -1).transpose(0, 2, 3, 1)
    codes = np.ascontiguousarray(words).view(np.uint8).reshape(tiles, units, -1)
    parts = [
        part.reshape(tiles, ROWS, units, part.shape[2], part.shape[3])
        .transpose(0, 2, 3, 1, 4)
        .reshape(tiles, units, -1)
        for part in padded_scales(fmt, quantized, rows)
    ]
    return {
        "codes": codes,
        "scales": np.concatenate(parts, axis=2),
        **tile_scale(fmt, quantized),
    }


def _unpack(fmt: Format, arrays: Mapping[str, np.ndarray], n: int, k: int) -> Quantized:
    tiles, units = _tiles(n, k)
    rows, sub = tiles * ROWS, subgroups(fmt)
    lanes = np.ascontiguousarray(arrays["codes"]).view("<u4").reshape(tiles, units, -1, ROWS)
    words = lanes.transpose(0, 3, 1, 2).reshape(rows, -1)
    if fmt.code_bits == 4:
        low, high = words & LOW_NIBBLES, (words & HIGH_NIBBLES) >> np.uint32(4)
        words = np.stack([low, high], axis=2).reshape(rows, -1)
    codes = np.ascontiguousarray(words).view(np.uint8).reshape(rows, -1)
    widths = [sub * ROWS * tensor.bytes for tensor in fmt.scale_tensors]
    cuts = np.split(arrays["scales"], np.cumsum(widths)[:-1], axis=2)
    parts = [
        cut.reshape(tiles, units, sub, ROWS, tensor.bytes)
        .transpose(0, 3, 1, 2, 4)
        .reshape(rows, units, sub, tensor.bytes)
        for cut, tensor in zip(cuts, fmt.scale_tensors, strict=True)
    ]
    return restored(fmt, codes, parts, rows_of_tiles(arrays, n), n, k)


def _shapes(fmt: Format, n: int, k: int) -> Shapes:
    tiles, units = _tiles(n, k)
    return {
        "codes": ((tiles, units, ROWS * COLUMNS * fmt.code_bits // 8), "uint8"),
        "scales": ((tiles, units, ROWS * scale_bytes(fmt)), "uint8"),
        **tile_scale_shape(fmt, n),
    }


register_layout(Layout("tile16x32", _pack, _unpack, _shapes, floats="dense16", rows_readable=True))
