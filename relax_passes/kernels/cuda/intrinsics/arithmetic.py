"""Arithmetic on 32-bit words, halves and floats: the small change of the other intrinsics."""

from __future__ import annotations

import numpy as np

from .base import Intrinsic, Source


def as_half2(word: np.ndarray) -> np.ndarray:
    """The two float16 of each word, [..., 2], the lower first."""
    return np.ascontiguousarray(word, dtype=np.uint32)[..., None].view(np.float16)


def as_word(half2: np.ndarray) -> np.ndarray:
    """Inverse of `as_half2`."""
    return np.ascontiguousarray(half2, dtype=np.float16).view(np.uint32)[..., 0]


HALF2 = Intrinsic(
    "amx_h2",
    "  return *reinterpret_cast<__half2*>(&v);",
    signature="__half2(unsigned v)",
    meaning=as_half2,
)
WORD = Intrinsic(
    "amx_u32",
    "  return *reinterpret_cast<unsigned*>(&v);",
    signature="unsigned(__half2 v)",
    meaning=as_word,
)
# Two floats, rounded to float16.
PACK_HALF2 = Intrinsic(
    "amx_pack_half2",
    "  return amx_u32(__floats2half2_rn(a, b));",
    (WORD,),
    signature="unsigned(float a, float b)",
    meaning=lambda a, b: as_word(np.stack([a, b], -1)),
)
# Byte i of several words.
BYTE = Intrinsic(
    "amx_byte",
    "  return (r[i >> 2] >> (8 * (i & 3))) & 0xffu;",
    signature="unsigned(const unsigned* r, int i)",
    meaning=lambda r, i: r[..., i >> 2] >> np.uint32(8 * (i & 3)) & np.uint32(0xFF),
)


def _high(r: np.ndarray, i: int, j: int) -> np.ndarray:
    word = r[..., i >> 2]
    first, second = (word >> np.uint32(8 * (p & 3)) & np.uint32(0xFF) for p in (i, j))
    return first << np.uint32(8) | second << np.uint32(24)


# Bytes i and j of one word, above zeros in the two halves.
HIGH = Intrinsic(
    "amx_high",
    "  return __byte_perm(r[i >> 2], 0u, 0x0404u | ((i & 3) << 4) | ((j & 3) << 12));",
    signature="unsigned(const unsigned* r, int i, int j)",
    meaning=_high,
)
# The float16 of 2^(b - 119), as bits: what an E8M0 byte stands for, times 2^8.
POWER = Intrinsic(
    "amx_power",
    "  return min(max((int)b - 104, 0), 30) << 10;",
    signature="unsigned(unsigned b)",
    meaning=lambda b: np.clip(b.astype(np.int32) - 104, 0, 30).astype(np.uint32) << np.uint32(10),
)
# Half h of a pair in both places: an operand's choice in the instruction that follows, no work.
ROW = Intrinsic(
    "amx_row",
    "  return h ? __high2half2(amx_h2(v)) : __low2half2(amx_h2(v));",
    (HALF2,),
    signature="__half2(unsigned v, int h)",
    meaning=lambda v, h: np.repeat(as_half2(v)[..., h : h + 1], 2, -1),
)
SILU = Intrinsic(
    "amx_silu",
    "  return v / (1.0f + __expf(-v));",
    signature="float(float v)",
    meaning=lambda v: v / (1 + np.exp(-v)),
)


def _clamped(gate: np.ndarray, up: np.ndarray, alpha: float, limit: float) -> np.ndarray:
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (up + 1) * gate / (1 + np.exp(-alpha * gate))


# The gate of gpt-oss.
CLAMPED_GATE = Intrinsic(
    "amx_clamped_gate",
    """
  gate = fminf(gate, limit);
  up = fminf(fmaxf(up, -limit), limit);
  return (up + 1.0f) * gate / (1.0f + __expf(-alpha * gate));""",
    signature="float(float gate, float up, float alpha, float limit)",
    meaning=_clamped,
)

# What decoding and products of all formats use.
COMMON: tuple[Source, ...] = (HALF2, WORD, BYTE, HIGH, POWER, ROW)
