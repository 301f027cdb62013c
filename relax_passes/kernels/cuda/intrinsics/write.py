# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""A warpgroup's tile of y, 64 rows of W, from registers to memory by stmatrix (sm_90a, E4M3).

Products are multiplied by the scales of their rows of x and rounded to float16 in registers.
CHUNK rows of x at a time go to shared memory, transposed, as [row of x][64 rows of W] in the
swizzle of tiles.py, and from there with gate or residual to y, 16 bytes a thread:

    for every CHUNK rows of x   scale, round, stmatrix; barrier of the warpgroup; read, finish, write

Two places in shared memory take turns, so that one barrier a chunk is enough.
"""

from __future__ import annotations

from functools import cache

from .arithmetic import CLAMPED_GATE, HALF2, PACK_HALF2, SILU
from .base import Intrinsic
from .finish import Finish
from .memory import LOAD_SHARED
from .sync import GROUP_BARRIER

CHUNK = 64  # rows of x
PLACE_BYTES = CHUNK * 128
SCRATCH_BYTES = 2 * PLACE_BYTES  # of a warpgroup

STORE_MATRICES = Intrinsic(
    "amx_store_matrices",
    """
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(a), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");""",
    signature="void(unsigned a, const unsigned* v)",
)


def writable(out_features: int) -> bool:
    """Whether rows of y are whole pieces of 16 bytes."""
    return out_features % 8 == 0


def _finished(what: Finish) -> str:
    """Text that makes 8 numbers o of y from the pieces in shared memory."""
    spec = what.spec
    if not spec.silu_mul:
        return """
      unsigned p[4];
      amx_lds4(p, place + row * 128 + ((c ^ (row & 7)) << 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 v = __half22float2(amx_h2(p[i]));
        o[2 * i] = v.x; o[2 * i + 1] = v.y;
      }"""
    gated = "amx_silu(g.{0}) * u.{0}"
    if spec.gate_alpha:
        gated = f"amx_clamped_gate(g.{{0}}, u.{{0}}, {spec.gate_alpha}f, {spec.gate_limit}f)"
    return f"""
      unsigned p[4], q[4];  // gate and up: tiles of 16 rows of W take turns
      const int gate = (c >> 1) * 4 + (c & 1);
      amx_lds4(p, place + row * 128 + ((gate ^ (row & 7)) << 4));
      amx_lds4(q, place + row * 128 + (((gate + 2) ^ (row & 7)) << 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {{
        const float2 g = __half22float2(amx_h2(p[i])), u = __half22float2(amx_h2(q[i]));
        o[2 * i] = {gated.format("x")}; o[2 * i + 1] = {gated.format("y")};
      }}"""


@cache
def write_tile(what: Finish) -> Intrinsic:
    """Write the tile that a warpgroup holds: `what.block_m` rows of x by 64 of W."""
    spec, n_out = what.spec, what.spec.out_features
    pieces = 4 if spec.silu_mul else 8  # of a row
    origin = "n0 >> 1" if spec.silu_mul else "n0"
    bias = tile_scale = residual = ""
    if spec.bias:
        bias = f"""
  b0 = bias[min(n0 + warp * 16 + lane / 4, {spec.n - 1})];
  b1 = bias[min(n0 + warp * 16 + lane / 4 + 8, {spec.n - 1})];"""
    if what.tile_scale:
        tile_scale = f" * tile_scale[min((n0 >> 4) + warp, {-(-spec.n // 16) - 1})]"
    if spec.residual:
        residual = f"""
      const uint4 r = *(const uint4*)(residual + (long long)(m0 + first + row) * {n_out} + out);
      const unsigned words[4] = {{r.x, r.y, r.z, r.w}};
#pragma unroll
      for (int i = 0; i < 4; ++i) {{
        const float2 v = __half22float2(amx_h2(words[i]));
        o[2 * i] += v.x; o[2 * i + 1] += v.y;
      }}"""
    return Intrinsic(
        what.name.replace("amx_finish", "amx_write"),
        f"""
  const half* residual = (const half*)residual_;
  const float *bias = (const float*)bias_, *tile_scale = (const float*)tile_scale_, *x_scale = (const float*)x_scale_;
  const int warp = tid / 32, lane = tid % 32;
  const float factor = *(const float*)w_scale{tile_scale};
  float b0 = 0.0f, b1 = 0.0f;{bias}
#pragma unroll
  for (int first = 0; first < {what.block_m}; first += {CHUNK}) {{
    const unsigned place = smem + (first / {CHUNK} % 2) * {PLACE_BYTES};
    float scale[{CHUNK // 4}];
#pragma unroll
    for (int i = 0; i < {CHUNK // 4}; ++i) {{
      const int row = m0 + first + i / 2 * 8 + lane % 4 * 2 + i % 2;
      scale[i] = row < m ? x_scale[row] * factor : 0.0f;
    }}
#pragma unroll
    for (int j = 0; j < {CHUNK // 8}; j += 2) {{
      unsigned v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {{
        const float* d = acc + (first / 8 + j + i / 2) * 4 + i % 2 * 2;
        const float* s = scale + (j + i / 2) * 2;
        const float b = i % 2 ? b1 : b0;
        v[i] = amx_pack_half2(d[0] * s[0] + b, d[1] * s[1] + b);
      }}
      const int row = (j + lane / 16) * 8 + lane % 8, c = warp * 2 + lane / 8 % 2;
      amx_store_matrices(place + row * 128 + ((c ^ (row & 7)) << 4), v);
    }}
    amx_group_barrier(group);
#pragma unroll
    for (int k = 0; k < {CHUNK * pieces // 128}; ++k) {{
      const int id = tid + k * 128, row = id / {pieces}, c = id % {pieces};
      const int out = ({origin}) + c * 8;
      if (m0 + first + row >= m || out >= {n_out}) continue;
      float o[8];{_finished(what)}{residual}
      const uint4 packed = make_uint4(amx_pack_half2(o[0], o[1]), amx_pack_half2(o[2], o[3]),
                                      amx_pack_half2(o[4], o[5]), amx_pack_half2(o[6], o[7]));
      *(uint4*)(y + (long long)(m0 + first + row) * {n_out} + out) = packed;
    }}
  }}""",
        (
            HALF2,
            PACK_HALF2,
            CLAMPED_GATE if spec.gate_alpha else SILU,
            LOAD_SHARED[4],
            STORE_MATRICES,
            GROUP_BARRIER,
        ),
        "void(const float* acc, unsigned smem, half* y, const void* residual_, const void* bias_, "
        "const void* tile_scale_, int m, int m0, int n0, int group, int tid, const void* x_scale_, "
        "const void* w_scale)",
    )
