# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""Work of the tile schedule: copies, decode from shared memory, products through ldmatrix.

x lies in shared memory as [stage][row of x][64 columns], rows of 128 bytes, in the 128-byte swizzle
that wgmma reads and that makes ldmatrix free of bank conflicts:

    16-byte chunk c (0..7) of row r is at   r * 128 + ((c ^ (r & 7)) * 16)
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .base import Intrinsic
from .decode import FragmentDecode
from .memory import COPY16, LOAD_SHARED, MATRIX
from .mma import MMA


def swizzled(row: np.ndarray, chunk: np.ndarray) -> np.ndarray:
    """Place of a 16-byte chunk of a row of x in its stage."""
    return row * 128 + (chunk ^ (row & 7)) * 16


# x rows [m0, m0 + BM) of 64 columns from `column`; rows beyond m and columns beyond K become 0.
def _copy_x(name: str, row: str, given: str) -> Intrinsic:
    return Intrinsic(
        name,
        f"""
#pragma unroll
  for (int i = 0; i < (BM * 8 + THREADS - 1) / THREADS; ++i) {{
    const int id = tid + i * THREADS, row = id >> 3, c = id & 7;
    if (BM * 8 % THREADS == 0 || id < BM * 8) {{
      const bool inside = m0 + row < m && column + c * 8 < K;
      const half* src = inside ? x + (long long){row} * K + column + c * 8 : x;
      amx_copy16_cg(dst + row * 128 + ((c ^ (row & 7)) << 4), src, inside);
    }}
  }}""",
        (COPY16,),
        f"void(unsigned dst, const half* x, {given}int m, int m0, int column, int tid)",
        "int BM, int THREADS, int K",
    )


COPY_X = _copy_x("amx_copy_x", "(m0 + row)", "")
# The same of rows of x that lie anywhere: row i of the product is row source[i] of x.
GATHER_X = _copy_x("amx_gather_x", "source[m0 + row]", "const int* source, ")
# A warp's codes and scales of one stage: UNITS loads of 512 bytes, and SCALES bytes.
COPY_W = Intrinsic(
    "amx_copy_w",
    """
#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    const int at = min(unit + u, last);
    amx_copy16_cg(dst + u * 512 + lane * 16, (const char*)codes + at * 512 + lane * 16, true);
    if (SCALES > 0 && lane < SCALES / UNITS / 16)
      amx_copy16_cg(sdst + u * (SCALES / UNITS) + lane * 16,
                    (const char*)scales + at * (SCALES / UNITS) + lane * 16, true);
  }""",
    (COPY16,),
    "void(unsigned dst, unsigned sdst, const void* codes, const void* scales, int unit, int last, int lane)",
    "int UNITS, int SCALES",
)


def _tile_meaning(
    rows: int, acc: np.ndarray, a: np.ndarray, memory: np.ndarray, xs: int
) -> np.ndarray:
    """The stage's products: acc [32, rows / 2], a [32, 16], x of the stage at `xs` in memory."""
    lane, acc = np.arange(32), acc.copy()
    r = (lane & 7) + ((lane >> 4) << 3)
    for j in range(4):
        chunk = 2 * j + ((lane >> 3) & 1)
        for n in range(rows // 16):
            b = MATRIX[4].meaning(memory, xs + swizzled(n * 16 + r, chunk))
            for half in range(2):
                place = slice(8 * n + 4 * half, 8 * n + 4 * half + 4)
                operand = b[:, 2 * half], b[:, 2 * half + 1]
                acc[:, place] = MMA.meaning(acc[:, place], a[:, 4 * j : 4 * j + 4], *operand)
    return acc


# acc[BM / 8][4] += a[4 steps][4] * x stage, through ldmatrix: two 8-row tiles of x a load.
TILE_MMA = Intrinsic(
    "amx_tile_mma",
    """
  const int r = (lane & 7) + ((lane >> 4) << 3);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int c = 2 * j + ((lane >> 3) & 1);
#pragma unroll
    for (int n = 0; n < BM / 16; ++n) {
      unsigned b[4];
      amx_matrix4(b, xs + (n * 16 + r) * 128 + ((c ^ (r & 7)) << 4));
      amx_mma(acc + 8 * n, a + 4 * j, b[0], b[1]);
      amx_mma(acc + 8 * n + 4, a + 4 * j, b[2], b[3]);
    }
  }""",
    (MATRIX[4], MMA),
    "void(float* acc, const unsigned* a, unsigned xs, int lane)",
    "int BM",
    _tile_meaning,
)


def stage_words(decode: FragmentDecode, columns: int = 64) -> tuple[int, int]:
    """Words of codes and of scales that a lane holds for a stage of so many columns."""
    shape = decode.shape
    units = columns // shape.unit
    return 4 * units, units * (shape.record // 4)


@cache
def read_stage(decode: FragmentDecode, columns: int = 64) -> Intrinsic:
    """Read a warp's codes and scales of a stage of so many columns from shared memory."""
    shape = decode.shape
    words = shape.record // 4 if shape.group else 0
    reads, needs = [], [LOAD_SHARED[4]]
    for u in range(columns // shape.unit):
        reads.append(f"  amx_lds4(w + {4 * u}, codes + {u * 512} + lane * 16);")
        if words:
            offset = f"scales + {u * 8 * shape.record} + (lane >> 2) * {shape.record}"
            reads.append(f"  {LOAD_SHARED[words].name}(rec + {words * u}, {offset});")
            needs.append(LOAD_SHARED[words])
    return Intrinsic(
        f"amx_words_{decode.ident}" + ("" if columns == 64 else f"_{columns}"),
        "\n".join(reads),
        tuple(dict.fromkeys(needs)),
        "void(unsigned* w, unsigned* rec, unsigned codes, unsigned scales, int lane)",
    )


@cache
def decode_stage(decode: FragmentDecode) -> Intrinsic:
    """Decode 16 columns of a stage into 4 scaled A registers.

    ``coef`` keeps a group's scales from its first step to its last.
    """
    shape, scaled = decode.shape, decode.half_coefficients
    steps, words = shape.unit // 16, shape.record // 4
    prepare = ""
    if scaled is not None:
        prepare = f"""
  if (step * 16 % {shape.group} == 0)
    {scaled.name}(rec + unit * {words}, step * 16 / {shape.group}, coef[0], coef[1]);"""

    def meaning(step: int, w: np.ndarray, rec: np.ndarray) -> np.ndarray:
        unit, inside = divmod(step, steps)
        a = b = None
        if scaled is not None:
            mine = rec[..., unit * words : (unit + 1) * words]
            a, b = scaled.meaning(mine, inside * 16 // shape.group)
        first = 4 * unit + inside * decode.words
        return decode.half.meaning(w[..., first : first + decode.words], a, b)

    return Intrinsic(
        f"amx_decode_{decode.ident}",
        f"""
  constexpr int unit = STEP / {steps}, step = STEP % {steps};{prepare}
  {decode.half.name}(w + 4 * unit + step * {decode.words}, coef[0], coef[1], a);""",
        (decode.half, *((scaled,) if scaled is not None else ())),
        "void(unsigned* a, const unsigned* w, const unsigned* rec, unsigned* coef)",
        "int STEP",
        meaning,
    )
