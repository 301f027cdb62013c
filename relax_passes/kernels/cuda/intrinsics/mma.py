# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""Products of one warp on the tensor cores: mma.m16n8k16, float16 in, float32 sums.

Registers of lane (g, t) = (lane / 4, lane % 4), halves 2t and 2t + 1 in a word:

    A [16, 16]   a[i], i = 2 kh + h:  row g + 8 h, columns 2t + 8 kh + {0, 1}
    B [16, 8]    b[kh]:               rows 2t + 8 kh + {0, 1}, column g
    C [16, 8]    c[2 h + e]:          row g + 8 h, column 2t + e
"""

from __future__ import annotations

import numpy as np

from .arithmetic import as_half2, as_word
from .base import Intrinsic


def _product(c: np.ndarray, a: np.ndarray, b0: np.ndarray, b1: np.ndarray) -> np.ndarray:
    """C + A B of a warp: c float32 [32, 4], a uint32 [32, 4], b uint32 [32] each."""
    left = as_half2(a).reshape(8, 4, 2, 2, 2).transpose(3, 0, 2, 1, 4)  # h g kh t e
    right = as_half2(np.stack([b0, b1], -1)).reshape(8, 4, 2, 2).transpose(2, 1, 3, 0)  # kh t e g
    sums = left.reshape(16, 16).astype(np.float64) @ right.reshape(16, 8).astype(np.float64)
    sums = sums.astype(np.float32)
    return c + sums.reshape(2, 8, 4, 2).transpose(1, 2, 0, 3).reshape(32, 4)


def _upper(a0: np.ndarray, a2: np.ndarray) -> np.ndarray:
    zero = np.zeros_like(a0)
    return np.stack([a0, zero, a2, zero], -1)


def _mma(name: str, text: str, meaning) -> Intrinsic:  # noqa: ANN001
    signature = "void(float* c, const unsigned* a, unsigned b0, unsigned b1)"
    return Intrinsic(name, text, signature=signature, meaning=meaning)


_INSTRUCTION = (
    '  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, '
    "{%4, %5, %6, %7}, {%8, %9}, "
)
_INPUTS = '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)'

MMA = _mma(
    "amx_mma",
    f"""{_INSTRUCTION}{{%0, %1, %2, %3}};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : {_INPUTS});""",
    _product,
)
# A product of which rows 8 to 15 of A are zero: c[0], c[1] alone, and registers for no others.
MMA_UPPER = Intrinsic(
    "amx_mma_upper",
    """  float low, high;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %5}, {%7, %8}, {%0, %1, %9, %9};"
               : "+f"(c[0]), "+f"(c[1]), "=f"(low), "=f"(high)
               : "r"(a0), "r"(0u), "r"(a2), "r"(b0), "r"(b1), "f"(0.0f));""",
    signature="void(float* c, unsigned a0, unsigned a2, unsigned b0, unsigned b1)",
    meaning=lambda c, a0, a2, b0, b1: _product(
        np.concatenate([c, np.zeros_like(c)], -1), _upper(a0, a2), b0, b1
    )[:, :2],
)
# A matrix of 8 x 8 halves of a warp, rows and columns exchanged: lane (g, t) has 2t, 2t + 1 of row g.
TURN_MATRIX = Intrinsic(
    "amx_turn_matrix",
    """  unsigned d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
  return d;""",
    signature="unsigned(unsigned v)",
    meaning=lambda v: as_word(as_half2(v).reshape(8, 8).T.reshape(32, 2)),
)
# The first product of a chain.
MMA_FIRST = _mma(
    "amx_mma_first",
    f"""{_INSTRUCTION}{{%10, %10, %10, %10}};"
               : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3]) : {_INPUTS}, "f"(0.0f));""",
    lambda c, a, b0, b1: _product(np.zeros_like(c), a, b0, b1),
)
