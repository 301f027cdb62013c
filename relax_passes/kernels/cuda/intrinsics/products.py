# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""Products of one format's fragments with x, and what scales make of the sums (decode schedule).

step               16 columns into the chains' accumulators
scale_plain        a finished group into the lane's sums
scale_diagonal     two finished groups into the lane's sums
wide               16 columns, scaled in registers, times several tiles of 8 rows of x
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .base import Intrinsic
from .decode import FragmentDecode
from .mma import MMA, MMA_FIRST


@cache
def step(decode: FragmentDecode) -> Intrinsic:
    """One step; FIRST starts new chains."""
    two = decode.chains == 2
    second, second_first = (
        f"{name}(acc + 4, r, b0, b1);" if two else "" for name in (MMA.name, MMA_FIRST.name)
    )

    def meaning(first: bool, acc: np.ndarray, w: np.ndarray, b0: np.ndarray, b1: np.ndarray):
        product = (MMA_FIRST if first else MMA).meaning
        chains = decode.first.meaning(w)[: decode.chains]
        sums = [product(acc[:, 4 * i : 4 * i + 4], a, b0, b1) for i, a in enumerate(chains)]
        return np.concatenate(sums, -1)

    return Intrinsic(
        f"amx_step_{decode.ident}",
        f"""
  unsigned q[4], r[4];
  {decode.first.name}(w, q, r);
  if constexpr (FIRST) {{
    amx_mma_first(acc, q, b0, b1); {second_first}
  }} else {{
    amx_mma(acc, q, b0, b1); {second}
  }}""",
        (MMA, MMA_FIRST, decode.first),
        "void(float* acc, const unsigned* w, unsigned b0, unsigned b1)",
        "bool FIRST",
        meaning,
    )


def _add(decode: FragmentDecode, out: str, index: str) -> str:
    """Add one sum, scaled; two multiply-adds in a row."""
    lines = f"{out} = fmaf(alpha[h], acc[{index}], {out});"
    if decode.chains == 2:
        lines += f" {out} = fmaf(beta[h], acc[4 + {index}], {out});"
    return lines


def _weighted(decode: FragmentDecode, acc: np.ndarray, rec: np.ndarray, group: int) -> np.ndarray:
    """Sums of a group of the lane, scaled: [32, h, e]."""
    assert decode.coefficients is not None
    coefficients = decode.coefficients.meaning(rec, group)
    return sum(
        coefficient[:, :, None] * acc[:, 4 * chain : 4 * chain + 4].reshape(32, 2, 2)
        for chain, coefficient in enumerate(coefficients[: decode.chains])
    )


@cache
def scale_plain(decode: FragmentDecode) -> Intrinsic:
    """out[4] += sums of one group of the lane: c0, c1 in row g, c2, c3 in row g + 8 (M <= 8)."""
    assert decode.coefficients is not None
    return Intrinsic(
        f"amx_scale_plain_{decode.ident}",
        f"""
  float alpha[2], beta[2];
  {decode.coefficients.name}(rec, group, alpha, beta);
#pragma unroll
  for (int h = 0; h < 2; ++h) {{
    {_add(decode, "out[2 * h]", "2 * h")}
    {_add(decode, "out[2 * h + 1]", "2 * h + 1")}
  }}""",
        (decode.coefficients,),
        "void(float* out, const float* acc, const unsigned* rec, int group)",
        meaning=lambda out, acc, rec, group: (
            out + _weighted(decode, acc, rec, group).reshape(32, 4)
        ),
    )


@cache
def scale_diagonal(decode: FragmentDecode) -> Intrinsic:
    """out[2] += sums of two groups of the lane: c0 is group 0, c1 group 1 (block-diagonal form)."""
    assert decode.coefficients is not None
    return Intrinsic(
        f"amx_scale_diagonal_{decode.ident}",
        f"""
#pragma unroll
  for (int group = 0; group < 2; ++group) {{
    float alpha[2], beta[2];
    {decode.coefficients.name}(rec, group, alpha, beta);
#pragma unroll
    for (int h = 0; h < 2; ++h) {{ {_add(decode, "out[h]", "2 * h + group")} }}
  }}""",
        (decode.coefficients,),
        "void(float* out, const float* acc, const unsigned* rec)",
        meaning=lambda out, acc, rec: (
            out + sum(_weighted(decode, acc, rec, group)[:, :, group] for group in range(2))
        ),
    )


@cache
def wide(decode: FragmentDecode) -> Intrinsic:
    """One step of 16 columns, scaled in registers, times TILES tiles of 8 rows of x (M > 8)."""
    scaled = decode.half_coefficients
    prepare = f"{scaled.name}(rec, group, a, b);" if scaled else ""

    def meaning(
        tiles: int, acc: np.ndarray, w: np.ndarray, rec: np.ndarray, group: int, x: np.ndarray
    ) -> np.ndarray:
        a, b = scaled.meaning(rec, group) if scaled else (None, None)
        registers = decode.half.meaning(w, a, b)
        sums = [
            MMA.meaning(acc[:, 4 * i : 4 * i + 4], registers, x[i, :, 0], x[i, :, 1])
            for i in range(tiles)
        ]
        return np.concatenate(sums, -1)

    return Intrinsic(
        f"amx_wide_{decode.ident}",
        f"""
  unsigned a = 0u, b = 0u, r[4];
  {prepare}
  {decode.half.name}(w, a, b, r);
#pragma unroll
  for (int i = 0; i < TILES; ++i) amx_mma(acc + 4 * i, r, x[i * stride], x[i * stride + 1]);""",
        (MMA, decode.half, *((scaled,) if scaled else ())),
        "void(float* acc, const unsigned* w, const unsigned* rec, int group, const unsigned* x, int stride)",
        "int TILES",
        meaning,
    )
