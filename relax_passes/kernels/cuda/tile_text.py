# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of the tile schedule: copies, decode from shared memory, products, epilogue.

x lies in shared memory as [stage][row of x][64 columns], rows of 128 bytes, in the 128-byte swizzle
that wgmma reads and that makes ldmatrix free of bank conflicts:

    16-byte chunk c (0..7) of row r is at   r * 128 + ((c ^ (r & 7)) * 16)
"""

from __future__ import annotations

from .buffers import Linear
from .decode_text import FragmentDecode
from .intrinsics import TEXT, format_text
from .tile_hopper_text import CLUSTER, TMA, WGMMA, wgmma_text

_ASYNC = r"""
#ifndef AMX_ASYNC
#define AMX_ASYNC
__device__ __forceinline__ void amx_copy16(unsigned dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(dst), "l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void amx_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void amx_copy_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}
__device__ __forceinline__ void amx_lds4(unsigned* d, unsigned a) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(a) : "memory");
}
__device__ __forceinline__ void amx_lds2(unsigned* d, unsigned a) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(a) : "memory");
}
__device__ __forceinline__ void amx_lds1(unsigned* d, unsigned a) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(d[0]) : "r"(a) : "memory");
}
__device__ __forceinline__ void amx_sts1(unsigned a, float v) {
  asm volatile("st.shared.f32 [%0], %1;" :: "r"(a), "f"(v) : "memory");
}
__device__ __forceinline__ void amx_barrier() { __syncthreads(); }
template <int THREADS> __device__ __forceinline__ void amx_barrier_of() {
  asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory");
}
#endif
"""

# x rows [m0, m0 + BM) of 64 columns from `column`; rows beyond m and columns beyond K become 0.
_COPY_X = r"""
#ifndef AMX_COPY_X
#define AMX_COPY_X
template <int BM, int THREADS, int K>
__device__ __forceinline__ void amx_copy_x(unsigned dst, const half* x, int m, int m0, int column, int tid) {
#pragma unroll
  for (int i = 0; i < (BM * 8 + THREADS - 1) / THREADS; ++i) {
    const int id = tid + i * THREADS, row = id >> 3, c = id & 7;
    if (BM * 8 % THREADS == 0 || id < BM * 8) {
      const bool inside = m0 + row < m && column + c * 8 < K;
      const half* src = inside ? x + (long long)(m0 + row) * K + column + c * 8 : x;
      amx_copy16(dst + row * 128 + ((c ^ (row & 7)) << 4), src, inside ? 16 : 0);
    }
  }
}
// A warp's codes and scales of one stage: UNITS loads of 512 bytes, and SCALES bytes.
template <int UNITS, int SCALES>
__device__ __forceinline__ void amx_copy_w(unsigned dst, unsigned sdst, const void* codes,
                                           const void* scales, int unit, int last, int lane) {
#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    const int at = min(unit + u, last);
    amx_copy16(dst + u * 512 + lane * 16, (const char*)codes + at * 512 + lane * 16, 16);
    if (SCALES > 0 && lane < SCALES / UNITS / 16)
      amx_copy16(sdst + u * (SCALES / UNITS) + lane * 16,
                 (const char*)scales + at * (SCALES / UNITS) + lane * 16, 16);
  }
}
#endif
"""

_LDMATRIX = r"""
#ifndef AMX_TILE_MMA
#define AMX_TILE_MMA
// acc[BM / 8][4] += a[4 steps][4] * x stage, through ldmatrix: two 8-row tiles of x a load
template <int BM>
__device__ __forceinline__ void amx_tile_mma(float* acc, const unsigned* a, unsigned xs, int lane) {
  const int r = (lane & 7) + ((lane >> 4) << 3);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int c = 2 * j + ((lane >> 3) & 1);
#pragma unroll
    for (int n = 0; n < BM / 16; ++n) {
      unsigned b[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                   : "r"(xs + (n * 16 + r) * 128 + ((c ^ (r & 7)) << 4)) : "memory");
      amx_mma(acc + 8 * n, a + 4 * j, b[0], b[1]);
      amx_mma(acc + 8 * n + 4, a + 4 * j, b[2], b[3]);
    }
  }
}
#endif
"""


def stage_words(decode: FragmentDecode) -> tuple[int, int]:
    """Words of codes and of scales that a lane holds for a stage of 64 columns."""
    shape = decode.shape
    units = 64 // shape.unit
    return 4 * units, units * (shape.record // 4)


def stage_decode_text(decode: FragmentDecode) -> str:
    """Read a warp's stage of 64 columns from shared memory, and decode it 16 columns at a time.

    ``amx_words_<format>`` reads codes and scales, ``amx_decode_<format><STEP>`` makes 4 scaled A
    registers; ``coef`` keeps a group's scales from its first step to its last.
    """
    shape, name = decode.shape, decode.ident
    steps, words = shape.unit // 16, shape.record // 4 if shape.group else 0
    reads = []
    for u in range(64 // shape.unit):
        reads.append(f"  amx_lds4(w + {4 * u}, codes + {u * 512} + lane * 16);")
        if words:
            offset = f"scales + {u * 8 * shape.record} + (lane >> 2) * {shape.record}"
            reads.append(f"  amx_lds{words}(rec + {words * u}, {offset});")
    prepare = ""
    if words:
        prepare = f"""
  if (step * 16 % {shape.group} == 0)
    amx_hcoef_{name}(rec + unit * {words}, step * 16 / {shape.group}, coef[0], coef[1]);"""
    body = "\n".join(reads)
    return f"""
#ifndef AMX_STAGE_{name}
#define AMX_STAGE_{name}
__device__ __forceinline__ void amx_words_{name}(unsigned* w, unsigned* rec, unsigned codes, unsigned scales,
                                                 int lane) {{
{body}
}}
template <int STEP>
__device__ __forceinline__ void amx_decode_{name}(unsigned* a, const unsigned* w, const unsigned* rec,
                                                  unsigned* coef) {{
  constexpr int unit = STEP / {steps}, step = STEP % {steps};{prepare}
  amx_half_{name}(w + 4 * unit + step * {decode.words}, coef[0], coef[1], a);
}}
#endif
"""


def finish_text(linear: Linear, rows: int, block_m: int, cluster: int) -> tuple[str, str]:
    """Write a finished tile: sum of the cluster's parts, epilogue, y. Returns (name, text).

    The tile is float32 [block_m][rows + 4] in shared memory. Four consecutive columns of y a
    thread.
    """
    spec = linear.spec
    n_out, factor = spec.out_features, linear.decode.half_factor
    flags = "".join(
        letter
        for letter, on in (
            ("s", spec.silu_mul),
            ("r", spec.residual),
            ("b", spec.bias),
            ("t", linear.tile_scale is not None),
        )
        if on
    )
    name = f"amx_finish_{linear.decode.ident}_{rows}_{block_m}_{cluster}_{n_out}_{flags or 'plain'}"
    outs = rows // 2 if spec.silu_mul else rows
    full = n_out % 4 == 0
    read = (
        "amx_peer4(a, peers + p)" if cluster > 1 else "*(const float4*)__cvta_shared_to_generic(a)"
    )
    pieces = [f"v[i] *= {factor}f;"] if factor != 1.0 else []
    if linear.tile_scale is not None:
        pieces.append("v[i] *= tile_scale[(n0 + column + i) >> 4];")
    if spec.bias:
        pieces.append(f"v[i] += bias[min(n0 + column + i, {spec.n - 1})];")
    if spec.silu_mul:
        gather = "const int column = (c >> 4) * 32 + (c & 15);"
        combine = """float g[4], u[4];
    part(column, g); part(column + 16, u);
    for (int i = 0; i < 4; ++i) o[i] = amx_silu(g[i]) * u[i];"""
        origin = "(n0 >> 1)"
    else:
        gather, combine, origin = "const int column = c;", "part(column, o);", "n0"
    residual = f"o[i] += __half2float(residual[(long long)row * {n_out} + out + i]);"
    store_full = f"""half2 lo = __floats2half2_rn(o[0], o[1]), hi = __floats2half2_rn(o[2], o[3]);
    uint2 packed = make_uint2(amx_u32(lo), amx_u32(hi));
    *(uint2*)(y + (long long)row * {n_out} + out) = packed;"""
    store_each = f"""for (int i = 0; i < 4; ++i)
      if (out + i < {n_out}) y[(long long)row * {n_out} + out + i] = __float2half_rn(o[i]);"""
    guard = "" if full else f"if (out + i < {n_out}) "
    add = f"for (int i = 0; i < 4; ++i) {guard}{residual}" if spec.residual else ""
    return (
        name,
        f"""
#ifndef {name.upper()}
#define {name.upper()}
__device__ __forceinline__ void {name}(unsigned smem, half* y, const void* residual_, const void* bias_,
                                       const void* tile_scale_, int m, int m0, int n0, int rank, int peers,
                                       int tid, int threads) {{
  const half* residual = (const half*)residual_;
  const float *bias = (const float*)bias_, *tile_scale = (const float*)tile_scale_;
  for (int id = tid; id < {block_m * outs // 4 // cluster}; id += threads) {{
    const int local = (id / {outs // 4}) * {cluster} + rank, c = (id % {outs // 4}) * 4, row = m0 + local;
    const int out = {origin} + c;
    if (row >= m || out >= {n_out}) continue;
    {gather}
    auto part = [&](int column, float* v) {{
      v[0] = v[1] = v[2] = v[3] = 0.0f;
#pragma unroll
      for (int p = 0; p < {cluster}; ++p) {{
        const unsigned a = smem + (local * {rows + 4} + column) * 4;
        const float4 q = {read};
        v[0] += q.x; v[1] += q.y; v[2] += q.z; v[3] += q.w;
      }}
#pragma unroll
      for (int i = 0; i < 4; ++i) {{ {" ".join(pieces)} }}
    }};
    float o[4];
    {combine}
    {add}
    {store_full if full else store_each}
  }}
}}
#endif
""",
    )


def tile_texts(linear: Linear, block_m: int, cluster: int, rows: int) -> tuple[str, dict[str, str]]:
    """Name of the finishing function, and the text to pass with a call by the name's beginning.

    TVM wants the same text with every call of a name, in all kernels of a module, so a text holds
    what its function needs and nothing that depends on other choices; guards skip what is there
    already.
    """
    finish_name, finish = finish_text(linear, rows, block_m, cluster)
    return finish_name, {
        finish_name: TEXT + CLUSTER + finish,
        "amx_words_": format_text(linear.decode) + _ASYNC + stage_decode_text(linear.decode),
        "amx_decode_": format_text(linear.decode) + _ASYNC + stage_decode_text(linear.decode),
        "amx_tile_wgmma_": TEXT + wgmma_text(block_m),
        "amx_tile_mma": TEXT + _LDMATRIX,
        "amx_wgmma_": TEXT + WGMMA,
        "amx_cluster_": TEXT + CLUSTER,
        "amx_copy_": TEXT + _ASYNC + _COPY_X,
        "amx_sts": TEXT + _ASYNC,
        "amx_barrier": TEXT + _ASYNC,
        "amx_tma_": TEXT + TMA,
        "amx_init_": TEXT + TMA,
        "amx_elect": TEXT + TMA,
        "amx_expect": TEXT + TMA,
        "amx_arrive": TEXT + TMA,
        "amx_wait_barrier": TEXT + TMA,
        "amx_": TEXT,
    }
