# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""Decoding one format's fragments: the only part of the schedules that knows formats.

For code c of row n and group g, the plain value is a sum of at most two chains:

    value(c) = FACTOR * (alpha[n, g] * first(c) + beta[n, g] * second(c))

    formats                      first              second            alpha          beta
    E2M1, two scales (AMXFP4)    q * 2^-14          |q| * 2^-14       s+ + s-        s+ - s-
    E2M1, one scale              q * 2^-14                            s
    int4                         c * 2^-24          2^-24 (ones)      s              -s * zero
    int8                         c - 128                              s
    float16                      w                                    1 (no scales)

Both chains are exact in float16 (subnormals included), and the tensor cores multiply them exactly,
so alpha and beta (for two scales twice what they should be, FACTOR is half) are applied to float32
sums of whole groups: the form for M <= 8, where the second product costs less than touching every
weight. For larger M the coefficients are applied in float16 registers instead and one chain is left
(`half` functions), with

    alpha * 2^E in float16,  so that the registers hold value / HALF_FACTOR.

E is 7 for E5M2 (and 8 or less elsewhere): products stay exact down to 2^-17 and scales may be 448.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from amx_tvm.formats import cuda_layout
from amx_tvm.formats.cuda_layout import FragmentShape, shape_of

from .arithmetic import COMMON, ROW, as_half2, as_word
from .base import Intrinsic
from .scales import SCALES

_FIRST = "void(const unsigned* w, unsigned* q, unsigned* r)"
_COEFFICIENTS = "void(const unsigned* rec, int group, float* alpha, float* beta)"
_HALF_COEFFICIENTS = "void(const unsigned* rec, int group, unsigned& a, unsigned& b)"
_HALF = "void(const unsigned* w, unsigned a, unsigned b, unsigned* out)"


@dataclass(frozen=True, eq=False)
class FragmentDecode:
    """The CUDA functions of one format.

    Attributes
    ----------
    shape : FragmentShape
    ident : str
        Part of the C names, unique for what the text does.
    chains : int
        1 or 2.
    factor, half_factor : float
        What sums of the two forms are multiplied by at the end.
    words : int
        32-bit words a lane holds for one step of 16 columns.
    first : Intrinsic
        A step's chains, 4 words each: (w) -> (q, r).
    coefficients : Intrinsic or None
        (rec, group) -> alpha and beta of rows g and g + 8; rec holds stored scales. None for
        formats without.
    half_coefficients : Intrinsic or None
        The same as float16 in the halves of a word each.
    half : Intrinsic
        A step's scaled registers: (w, a, b) -> out.
    """

    shape: FragmentShape
    ident: str
    chains: int
    factor: float
    half_factor: float
    words: int
    first: Intrinsic
    coefficients: Intrinsic | None
    half_coefficients: Intrinsic | None
    half: Intrinsic


def _fused(a: np.ndarray, b: np.ndarray, c: Any) -> np.ndarray:
    """Round a b + c of float16 once."""
    return (a.astype(np.float64) * b.astype(np.float64) + c).astype(np.float16)


def _row(word: np.ndarray, i: int) -> np.ndarray:
    return ROW.meaning(word, i & 1)


def _pairs(make: Callable[[int], np.ndarray]) -> np.ndarray:
    """Words of the four register pairs of a step, from pairs of float16."""
    return np.stack([as_word(make(i)) for i in range(4)], -1)


# -- E2M1 --------------------------------------------------------------------------------------------


def _e2m1_first(name: str, element: str, two: bool) -> Intrinsic:
    """Chains of a step of E2M1 codes: shifts and masks only."""
    lines = []
    ups = [9 - cuda_layout.magnitude_bit(i, element) for i in range(4)]
    signs = [15 - cuda_layout.sign_bit(i, element) for i in range(4)]
    for i, (up, sign) in enumerate(zip(ups, signs, strict=True)):
        shifted = f"(w[0] << {up})" if up > 0 else f"(w[0] >> {-up})" if up else "w[0]"
        lines.append(f"  unsigned m{i} = {shifted} & 0x0E000E00u;")
        lines.append(f"  q[{i}] = ((w[0] << {sign}) & 0x80008000u) | m{i};")
        if two:
            lines.append(f"  r[{i}] = m{i};")

    def meaning(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        magnitude, signed = [], []
        for up, sign in zip(ups, signs, strict=True):
            word = w[..., 0] << np.uint32(up) if up >= 0 else w[..., 0] >> np.uint32(-up)
            magnitude.append(word & np.uint32(0x0E000E00))
            signed.append(w[..., 0] << np.uint32(sign) & np.uint32(0x80008000) | magnitude[-1])
        return np.stack(signed, -1), np.stack(magnitude, -1)

    return Intrinsic(f"amx_first_{name}", "\n".join(lines), signature=_FIRST, meaning=meaning)


def _coefficients(name: str, types: tuple[str, ...]) -> tuple[Intrinsic, Intrinsic]:
    """Return alpha and beta as floats and as pairs of float16, for formats with 8-bit scales."""
    kind, n = SCALES[types[0]], len(types)
    gain = float(2**kind.gain)
    places = [{"i": f"{2 * n} * group + {i}", "j": f"{2 * n} * group + {n + i}"} for i in range(n)]
    floats = [kind.floats.format(**place) for place in places]
    pairs = [f"amx_h2({kind.halves.format(**place)})" for place in places]
    if n == 2:
        as_float = f"""
  const float2 p = {floats[0]}, n = {floats[1]};
  alpha[0] = p.x + n.x; beta[0] = p.x - n.x; alpha[1] = p.y + n.y; beta[1] = p.y - n.y;"""
        as_half = f"""
  const __half2 gain = __float2half2_rn({gain / 2}f), p = {pairs[0]};
  const __half2 n = __hmul2({pairs[1]}, gain);
  a = amx_u32(__hfma2(p, gain, n));
  b = amx_u32(__hfma2(p, gain, __hneg2(n)));"""
    else:
        as_float = f"  const float2 s = {floats[0]}; alpha[0] = s.x; alpha[1] = s.y;"
        as_half = f"""
  a = amx_u32(__hmul2({pairs[0]}, __float2half2_rn({gain}f)));
  b = 0u;"""

    def values(read: Callable[..., np.ndarray], rec: np.ndarray, group: int) -> list[np.ndarray]:
        return [read(rec, 2 * n * group + i, 2 * n * group + n + i) for i in range(n)]

    def float_meaning(rec: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
        found = values(kind.as_floats, rec, group)
        return (found[0] + found[1], found[0] - found[1]) if n == 2 else (found[0], 0 * found[0])

    def half_meaning(rec: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
        found, factor = values(kind.as_halves, rec, group), np.asarray(gain / n, np.float16)
        if n == 1:
            return as_word(found[0] * factor), np.zeros_like(as_word(found[0]))
        low = found[1] * factor
        return as_word(_fused(found[0], factor, low)), as_word(_fused(found[0], factor, -low))

    return (
        Intrinsic(f"amx_coef_{name}", as_float, COMMON, _COEFFICIENTS, meaning=float_meaning),
        Intrinsic(f"amx_hcoef_{name}", as_half, COMMON, _HALF_COEFFICIENTS, meaning=half_meaning),
    )


def _e2m1(shape: FragmentShape) -> FragmentDecode:
    """Decode E2M1 with one or two 8-bit scales."""
    kind, two = SCALES[shape.scale_types[0]], len(shape.scale_types) == 2
    name = f"{shape.element}_{'x'.join(shape.scale_types).lower()}_g{shape.group}"
    first = _e2m1_first(name, shape.element, two)
    scaled = "__hmul2(amx_row(a, h), amx_h2(q[i]))"
    if two:
        # the absolute value is an operand's choice too
        second = "__hmul2(amx_row(b, h), __habs2(amx_h2(q[i])))"
        scaled = f"__hfma2(amx_row(a, h), amx_h2(q[i]), {second})"
    text = f"""
  unsigned q[4], r[4];
  amx_first_{name}(w, q, r);
#pragma unroll
  for (int i = 0; i < 4; ++i) {{
    const int h = i & 1;
    out[i] = amx_u32({scaled});
  }}"""

    def meaning(w: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        signed = as_half2(first.meaning(w)[0])  # [..., 4, 2]

        def pair(i: int) -> np.ndarray:
            second = _row(b, i) * np.abs(signed[..., i, :]) if two else 0.0
            return _fused(_row(a, i), signed[..., i, :], second)

        return _pairs(pair)

    return FragmentDecode(
        shape,
        name,
        chains=1 + two,
        factor=2.0 ** (14 - two) * kind.factor,
        half_factor=2.0 ** (14 - kind.exponent),
        words=1,
        first=first,
        coefficients=(coefficients := _coefficients(name, shape.scale_types))[0],
        half_coefficients=coefficients[1],
        half=Intrinsic(f"amx_half_{name}", text, (*COMMON, first), _HALF, meaning=meaning),
    )


# -- integers and float16 ----------------------------------------------------------------------------


def _int4(shape: FragmentShape) -> FragmentDecode:
    """Decode 4-bit integers with a float16 scale and a zero point (stored as float16)."""
    name = f"int4_g{shape.group}"
    shift = [cuda_layout.nibble_bit(i) for i in range(4)]
    assert shift == [0, 4, 8, 12]  # what the texts' 4 * i says

    def codes(w: np.ndarray) -> np.ndarray:
        return np.stack([w[..., 0] >> np.uint32(s) & np.uint32(0x000F000F) for s in shift], -1)

    def records(rec: np.ndarray, group: int) -> np.ndarray:
        return as_half2(rec[..., 2 * group : 2 * group + 2])  # [..., h, (scale, zero)]

    first = Intrinsic(
        f"amx_first_{name}",
        """
#pragma unroll
  for (int i = 0; i < 4; ++i) { q[i] = (w[0] >> (4 * i)) & 0x000F000Fu; r[i] = 0x00010001u; }""",
        signature=_FIRST,
        meaning=lambda w: (codes(w), np.full((*w.shape[:-1], 4), 0x00010001, np.uint32)),
    )

    def float_meaning(rec: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
        pair = records(rec, group).astype(np.float32)
        return pair[..., 0], -pair[..., 0] * pair[..., 1]

    coefficients = Intrinsic(
        f"amx_coef_{name}",
        """
#pragma unroll
  for (int h = 0; h < 2; ++h) {  // scale and zero point
    const float2 pair = __half22float2(amx_h2(rec[2 * group + h]));
    alpha[h] = pair.x; beta[h] = -pair.x * pair.y;
  }""",
        COMMON,
        _COEFFICIENTS,
        meaning=float_meaning,
    )
    half_coefficients = Intrinsic(
        f"amx_hcoef_{name}",
        """
  a = __byte_perm(rec[2 * group], rec[2 * group + 1], 0x5410);
  const unsigned zero = __byte_perm(rec[2 * group], rec[2 * group + 1], 0x7632);
  b = amx_u32(__hadd2(amx_h2(zero), __float2half2_rn(1024.0f)));""",
        COMMON,
        _HALF_COEFFICIENTS,
        meaning=lambda rec, group: (
            as_word(records(rec, group)[..., 0]),
            as_word(records(rec, group)[..., 1] + np.float16(1024)),
        ),
    )

    def meaning(w: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        halves = as_half2(codes(w) | np.uint32(0x64006400))
        return _pairs(lambda i: _row(a, i) * (halves[..., i, :] - _row(b, i)))

    # 0x6400 | c is 1024 + c; minus 1024 + zero is exact
    half = Intrinsic(
        f"amx_half_{name}",
        """
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int h = i & 1;
    unsigned c = ((w[0] >> (4 * i)) & 0x000F000Fu) | 0x64006400u;
    out[i] = amx_u32(__hmul2(amx_row(a, h), __hsub2(amx_h2(c), amx_row(b, h))));
  }""",
        COMMON,
        _HALF,
        meaning=meaning,
    )
    parts = (first, coefficients, half_coefficients, half)
    return FragmentDecode(shape, name, 2, 2.0**24, 1.0, 1, *parts)


def _int8(shape: FragmentShape) -> FragmentDecode:
    """Decode bytes with offset 128 and a float16 scale."""
    name = f"int8_g{shape.group}"

    def bytes_of(w: np.ndarray) -> np.ndarray:
        halves = np.ascontiguousarray(w).view(np.uint8).reshape(*w.shape[:-1], 4, 2)
        return as_word(halves.astype(np.float16) - np.float16(128))

    # A byte under 0x64 is 1024 + byte; 0xE480 is -1152.
    first = Intrinsic(
        f"amx_first_{name}",
        """
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    unsigned c = __byte_perm(w[i >> 1], 0x64646464u, (i & 1) ? 0x4342 : 0x4140);
    q[i] = amx_u32(__hadd2(amx_h2(c), amx_h2(0xE480E480u)));
  }""",
        COMMON,
        _FIRST,
        meaning=lambda w: (bytes_of(w), None),
    )

    def float_meaning(rec: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
        scales = as_half2(rec[..., group]).astype(np.float32)
        return scales, 0 * scales

    coefficients = Intrinsic(
        f"amx_coef_{name}",
        """
  const float2 s = __half22float2(amx_h2(rec[group]));
  alpha[0] = s.x; alpha[1] = s.y;""",
        COMMON,
        _COEFFICIENTS,
        meaning=float_meaning,
    )
    half_coefficients = Intrinsic(
        f"amx_hcoef_{name}",
        "  a = rec[group]; b = 0u;",
        signature=_HALF_COEFFICIENTS,
        meaning=lambda rec, group: (rec[..., group], np.zeros_like(rec[..., group])),
    )
    half = Intrinsic(
        f"amx_half_{name}",
        f"""
  unsigned q[4];
  amx_first_{name}(w, q, q);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = amx_u32(__hmul2(amx_row(a, i & 1), amx_h2(q[i])));""",
        (*COMMON, first),
        _HALF,
        meaning=lambda w, a, b: _pairs(lambda i: _row(a, i) * as_half2(bytes_of(w)[..., i])),
    )
    parts = (first, coefficients, half_coefficients, half)
    return FragmentDecode(shape, name, 1, 1.0, 1.0, 2, *parts)


def _float16(shape: FragmentShape) -> FragmentDecode:
    """Plain float16 fragments: nothing to decode."""
    copy = "#pragma unroll\n  for (int i = 0; i < 4; ++i) {out}[i] = w[i];"
    first = Intrinsic(
        "amx_first_float16",
        copy.format(out="q"),
        signature=_FIRST,
        meaning=lambda w: (w, None),
    )
    half = Intrinsic(
        "amx_half_float16", copy.format(out="out"), signature=_HALF, meaning=lambda w, a, b: w
    )
    return FragmentDecode(shape, "float16", 1, 1.0, 1.0, 4, first, None, None, half)


_ELEMENTS = {"e2m1": _e2m1, "nibbles": _e2m1, "int4": _int4, "int8": _int8, "float16": _float16}


@cache
def _decode(shape: FragmentShape) -> FragmentDecode:
    return _ELEMENTS[shape.element](shape)


def decode_of(fmt, nibbles: bool = False) -> FragmentDecode:  # noqa: ANN001
    """CUDA functions for a format of the registry, or for None: plain float16 weights.

    ``nibbles`` as in ``shape_of``.
    """
    return _decode(shape_of(fmt, nibbles))
