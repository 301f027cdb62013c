# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text that decodes one format's fragments: the only part of the schedules that knows formats.

For code c of row n and group g, the plain value is a sum of at most two chains:

    value(c) = FACTOR * (alpha[n, g] * first(c) + beta[n, g] * second(c))

    formats                      first              second            alpha          beta
    E2M1, two scales (AMXFP4)    q * 2^-14          |q| * 2^-14       s+ + s-        s+ - s-
    E2M1, one scale              q * 2^-14                            s
    int4                         c * 2^-24          2^-24 (ones)      s              -s * zero
    int8                         c - 128                              s
    float16                      w                                    1 (no scales)

Both chains are exact in float16 (subnormals included), and the tensor cores multiply them exactly,
so alpha and beta (for two scales twice what they should be, FACTOR is half) are applied to float32 sums of whole groups: the form for M <= 8, where the second
product costs less than touching every weight. For larger M the coefficients are applied in float16
registers instead and one chain is left (`half` functions), with

    alpha * 2^E in float16,  so that the registers hold value / HALF_FACTOR.

E is 7 for E5M2 (and 8 or less elsewhere): products stay exact down to 2^-17 and scales may be 448.
"""

from __future__ import annotations

from dataclasses import dataclass

from amx_tvm.formats.cuda_layout import FragmentShape, shape_of

# E of the docstring, by scale type; E2M1 codes add 2^-14.
_HALF_EXPONENT = {"E5M2": 7, "E4M3": 5, "E8M0": 8, "float16": 0}

_SCALE_FLOAT2 = {
    # Bytes i and j as two floats. A byte of E5M2 is the upper half of a float16
    "E5M2": "__half22float2(amx_h2(amx_high(rec, {i}, {j})))",
    # exponent and mantissa at a float16's place: the value times 2^-8, subnormals included; the
    # factor takes it back
    "E4M3": "__half22float2(amx_h2(amx_high(rec, {i}, {j}) >> 1))",
    "E8M0": "make_float2(__uint_as_float(amx_byte(rec, {i}) << 23), "
    "__uint_as_float(amx_byte(rec, {j}) << 23))",
}
_FLOAT_FACTOR = {"E5M2": 1.0, "E4M3": 256.0, "E8M0": 1.0}

_SCALE_HALF2 = {
    # Bytes i and j as two float16, times 2^0, 2^-8, 2^E: what HALF2_GAIN multiplies away;
    # amx_high puts the bytes into the upper halves
    "E5M2": "amx_high(rec, {i}, {j})",
    "E4M3": "(amx_high(rec, {i}, {j}) >> 1)",
    "E8M0": "(amx_power(amx_byte(rec, {i})) | amx_power(amx_byte(rec, {j})) << 16)",
}
_HALF2_GAIN = {"E5M2": 7, "E4M3": 13, "E8M0": 0}

COMMON = r"""
#ifndef AMX_COMMON
#define AMX_COMMON
#include <cuda_fp16.h>
__device__ __forceinline__ __half2 amx_h2(unsigned v) { return *reinterpret_cast<__half2*>(&v); }
__device__ __forceinline__ unsigned amx_u32(__half2 v) { return *reinterpret_cast<unsigned*>(&v); }
__device__ __forceinline__ unsigned amx_byte(const unsigned* r, int i) {
  return (r[i >> 2] >> (8 * (i & 3))) & 0xffu;
}
// Bytes i and j of one word above zeros.
__device__ __forceinline__ unsigned amx_high(const unsigned* r, int i, int j) {
  return __byte_perm(r[i >> 2], 0u, 0x0404u | ((i & 3) << 4) | ((j & 3) << 12));
}
__device__ __forceinline__ unsigned amx_power(unsigned b) { return min(max((int)b - 104, 0), 30) << 10; }
// Half h of a pair in both places: an operand's choice in the instruction that follows, no work.
__device__ __forceinline__ __half2 amx_row(unsigned v, int h) {
  return h ? __high2half2(amx_h2(v)) : __low2half2(amx_h2(v));
}
#endif
"""


@dataclass(frozen=True)
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
    text : str
        Definitions of ``amx_first_<ident>(w, q, r)`` (a step's chains: 4 words each),
        ``amx_coef_<ident>(rec, group, alpha, beta)`` (of rows g and g + 8),
        ``amx_hcoef_<ident>(rec, group, a, b)`` (the same as float16 in the halves of a word) and
        ``amx_half_<ident>(w, a, b, out)`` (a step's scaled registers). ``rec`` holds stored scales.
    """

    shape: FragmentShape
    ident: str
    chains: int
    factor: float
    half_factor: float
    words: int
    text: str


def _e2m1_chains(name: str, two: bool) -> str:
    """Write the chains of a step of E2M1 codes: shifts and masks only."""
    lines = [
        f"__device__ __forceinline__ void amx_first_{name}(const unsigned* w, unsigned* q, unsigned* r) {{"
    ]
    for i in range(4):
        magnitude = f"(w[0] << {3 * i}) & 0x0E000E00u" if i else "w[0] & 0x0E000E00u"
        lines.append(f"  unsigned m{i} = {magnitude};")
        lines.append(f"  q[{i}] = ((w[0] << {i}) & 0x80008000u) | m{i};")
        if two:
            lines.append(f"  r[{i}] = m{i};")
    return "\n".join([*lines, "}"])


def _coefficients(name: str, types: tuple[str, ...]) -> str:
    """Write alpha and beta as floats and as pairs of float16, for formats with 8-bit scales."""
    kind, n = types[0], len(types)
    gain = float(2 ** _HALF2_GAIN[kind])
    places = [{"i": f"{2 * n} * group + {i}", "j": f"{2 * n} * group + {n + i}"} for i in range(n)]
    floats = [_SCALE_FLOAT2[kind].format(**place) for place in places]
    pairs = [f"amx_h2({_SCALE_HALF2[kind].format(**place)})" for place in places]
    if n == 2:
        as_float = f"""  const float2 p = {floats[0]}, n = {floats[1]};
  alpha[0] = p.x + n.x; beta[0] = p.x - n.x; alpha[1] = p.y + n.y; beta[1] = p.y - n.y;"""
        as_half = f"""  const __half2 gain = __float2half2_rn({gain / 2}f), p = {pairs[0]};
  const __half2 n = __hmul2({pairs[1]}, gain);
  a = amx_u32(__hfma2(p, gain, n));
  b = amx_u32(__hfma2(p, gain, __hneg2(n)));"""
    else:
        as_float = f"  const float2 s = {floats[0]}; alpha[0] = s.x; alpha[1] = s.y;"
        as_half = f"""  a = amx_u32(__hmul2({pairs[0]}, __float2half2_rn({gain}f)));
  b = 0u;"""
    return f"""
__device__ __forceinline__ void amx_coef_{name}(const unsigned* rec, int group, float* alpha, float* beta) {{
{as_float}
}}
__device__ __forceinline__ void amx_hcoef_{name}(const unsigned* rec, int group, unsigned& a, unsigned& b) {{
{as_half}
}}"""


def _e2m1(shape: FragmentShape) -> FragmentDecode:
    """Decode E2M1 with one or two 8-bit scales."""
    kind, two = shape.scale_types[0], len(shape.scale_types) == 2
    name = f"e2m1_{'x'.join(shape.scale_types).lower()}_g{shape.group}"
    scaled = "__hmul2(amx_row(a, h), amx_h2(q[i]))"
    if two:
        # the absolute value is an operand's choice too
        second = "__hmul2(amx_row(b, h), __habs2(amx_h2(q[i])))"
        scaled = f"__hfma2(amx_row(a, h), amx_h2(q[i]), {second})"
    text = f"""{_e2m1_chains(name, two)}
{_coefficients(name, shape.scale_types)}
__device__ __forceinline__ void amx_half_{name}(const unsigned* w, unsigned a, unsigned b, unsigned* out) {{
  unsigned q[4], r[4];
  amx_first_{name}(w, q, r);
#pragma unroll
  for (int i = 0; i < 4; ++i) {{
    const int h = i & 1;
    out[i] = amx_u32({scaled});
  }}
}}"""
    half_factor = 2.0 ** (14 - _HALF_EXPONENT[kind])
    factor = 2.0 ** (14 - two) * _FLOAT_FACTOR[kind]
    return FragmentDecode(shape, name, 1 + two, factor, half_factor, 1, text)


def _int4(shape: FragmentShape) -> FragmentDecode:
    """Decode 4-bit integers with a float16 scale and a zero point (stored as float16)."""
    name = f"int4_g{shape.group}"
    text = f"""
__device__ __forceinline__ void amx_first_{name}(const unsigned* w, unsigned* q, unsigned* r) {{
#pragma unroll
  for (int i = 0; i < 4; ++i) {{ q[i] = (w[0] >> (4 * i)) & 0x000F000Fu; r[i] = 0x00010001u; }}
}}
__device__ __forceinline__ void amx_coef_{name}(const unsigned* rec, int group, float* alpha, float* beta) {{
#pragma unroll
  for (int h = 0; h < 2; ++h) {{  // scale and zero point
    const float2 pair = __half22float2(amx_h2(rec[2 * group + h]));
    alpha[h] = pair.x; beta[h] = -pair.x * pair.y;
  }}
}}
__device__ __forceinline__ void amx_hcoef_{name}(const unsigned* rec, int group, unsigned& a, unsigned& b) {{
  a = __byte_perm(rec[2 * group], rec[2 * group + 1], 0x5410);
  const unsigned zero = __byte_perm(rec[2 * group], rec[2 * group + 1], 0x7632);
  b = amx_u32(__hadd2(amx_h2(zero), __float2half2_rn(1024.0f)));
}}
// 0x6400 | c is 1024 + c; minus 1024 + zero is exact.
__device__ __forceinline__ void amx_half_{name}(const unsigned* w, unsigned a, unsigned b, unsigned* out) {{
#pragma unroll
  for (int i = 0; i < 4; ++i) {{
    const int h = i & 1;
    unsigned c = ((w[0] >> (4 * i)) & 0x000F000Fu) | 0x64006400u;
    out[i] = amx_u32(__hmul2(amx_row(a, h), __hsub2(amx_h2(c), amx_row(b, h))));
  }}
}}"""
    return FragmentDecode(shape, name, 2, 2.0**24, 1.0, 1, text)


def _int8(shape: FragmentShape) -> FragmentDecode:
    """Decode bytes with offset 128 and a float16 scale."""
    name = f"int8_g{shape.group}"
    text = f"""
// A byte under 0x64 is 1024 + byte; 0xE480 is -1152.
__device__ __forceinline__ void amx_first_{name}(const unsigned* w, unsigned* q, unsigned* r) {{
#pragma unroll
  for (int i = 0; i < 4; ++i) {{
    unsigned c = __byte_perm(w[i >> 1], 0x64646464u, (i & 1) ? 0x4342 : 0x4140);
    q[i] = amx_u32(__hadd2(amx_h2(c), amx_h2(0xE480E480u)));
  }}
}}
__device__ __forceinline__ void amx_coef_{name}(const unsigned* rec, int group, float* alpha, float* beta) {{
  const float2 s = __half22float2(amx_h2(rec[group]));
  alpha[0] = s.x; alpha[1] = s.y;
}}
__device__ __forceinline__ void amx_hcoef_{name}(const unsigned* rec, int group, unsigned& a, unsigned& b) {{
  a = rec[group]; b = 0u;
}}
__device__ __forceinline__ void amx_half_{name}(const unsigned* w, unsigned a, unsigned b, unsigned* out) {{
  unsigned q[4];
  amx_first_{name}(w, q, q);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = amx_u32(__hmul2(amx_row(a, i & 1), amx_h2(q[i])));
}}"""
    return FragmentDecode(shape, name, 1, 1.0, 1.0, 2, text)


def _float16(shape: FragmentShape) -> FragmentDecode:
    """Plain float16 fragments: nothing to decode."""
    text = """
__device__ __forceinline__ void amx_first_float16(const unsigned* w, unsigned* q, unsigned* r) {
#pragma unroll
  for (int i = 0; i < 4; ++i) q[i] = w[i];
}
__device__ __forceinline__ void amx_half_float16(const unsigned* w, unsigned a, unsigned b, unsigned* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = w[i];
}"""
    return FragmentDecode(shape, "float16", 1, 1.0, 1.0, 4, text)


def decode_of(fmt) -> FragmentDecode:
    """CUDA text for a format of the registry, or for None: plain float16 weights."""
    shape = shape_of(fmt)
    make = {"e2m1": _e2m1, "int4": _int4, "int8": _int8, "float16": _float16}[shape.element]
    return make(shape)
