"""Packed layout "dense16": a float32 matrix in tiles of 16 rows, for unquantized linears.

    dense16 float32 [ceil(N/16), K, 16]   one load is 16 rows' weights of one column

Padding rows are zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from amx_tvm.formats.packing import TILE_ROWS, Arrays, Layout, Shapes, register_layout

NAME = "dense16"


def _pack(_fmt: None, matrix: np.ndarray) -> Arrays:
    n, k = matrix.shape
    padded = np.zeros((-(-n // TILE_ROWS) * TILE_ROWS, k), np.float32)
    padded[:n] = matrix
    return {NAME: padded.reshape(-1, TILE_ROWS, k).transpose(0, 2, 1)}


def _unpack(_fmt: None, arrays: Mapping[str, np.ndarray], n: int, k: int) -> np.ndarray:
    return arrays[NAME].transpose(0, 2, 1).reshape(-1, k)[:n]


def _shapes(_fmt: None, n: int, k: int) -> Shapes:
    return {NAME: ((-(-n // TILE_ROWS), k, TILE_ROWS), "float32")}


register_layout(Layout(NAME, _pack, _unpack, _shapes, quantized=False))
