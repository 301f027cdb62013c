# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""The instructions that TensorIR has no statement for, as CUDA functions called from the IR.

TVM 0.27 emits the text of ``T.cuda.func_call(name, ..., source_code=text)`` once a name, above the
kernel. All functions are forced inline and touch arrays by constant indices once loops are
unrolled, so local buffers stay in registers. Shared memory is addressed by 32-bit shared-window
addresses: the IR sees no access, so TVM inserts no barriers of its own and the kernels place
theirs.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from .decode_text import COMMON, FragmentDecode

_MEMORY = r"""
#ifndef AMX_MEMORY
#define AMX_MEMORY
// Weights are read once: keep them out of L1.
__device__ __forceinline__ void amx_ldg_words4(unsigned* d, const void* p) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "l"(p));
}
__device__ __forceinline__ void amx_ldg_words2(unsigned* d, const void* p) {
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "l"(p));
}
__device__ __forceinline__ void amx_ldg_words1(unsigned* d, const void* p) {
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(d[0]) : "l"(p));
}
// Activations are written by the kernel before: read after griddepcontrol.wait. 16 bytes a lane to
// shared memory, zeros where `inside` is false; kept in L1 for the other blocks of the
// multiprocessor.
__device__ __forceinline__ void amx_fetch_x(unsigned dst, const void* p, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
               :: "r"(dst), "l"(p), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void amx_fetch_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups but the last N are there, for all lanes.
template <int N> __device__ __forceinline__ void amx_fetch_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
  __syncwarp();
}
__device__ __forceinline__ void amx_warp_sync() { __syncwarp(); }
// Four (two) registers of the x operand: matrices of 8 columns x 16 bytes, one row address a lane.
__device__ __forceinline__ void amx_matrix4(unsigned* d, unsigned a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(a) : "memory");
}
__device__ __forceinline__ void amx_matrix2(unsigned* d, unsigned a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1]) : "r"(a) : "memory");
}
__device__ __forceinline__ unsigned amx_smem(const void* p) {
  return (unsigned)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void amx_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// A loop that ends at once (no grid has 0 blocks): in straight code ptxas 13.0 moves loads of weights
// that stand before the wait behind it.
__device__ __forceinline__ void amx_wait_prerequisites() {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %0, 0;\nG_%=:\ngriddepcontrol.wait;\n@p bra G_%=;\n}"
               :: "r"(gridDim.z) : "memory");
#endif
}
__device__ __forceinline__ float amx_shuffle_add(float v, int mask) {
  return v + __shfl_xor_sync(0xffffffffu, v, mask);
}
// The warp's value, which the compiler then knows to be alike in all lanes.
__device__ __forceinline__ int amx_uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }
__device__ __forceinline__ float amx_silu(float v) { return v / (1.0f + __expf(-v)); }
#endif
"""

_MMA = r"""
#ifndef AMX_MMA
#define AMX_MMA
__device__ __forceinline__ void amx_mma(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
               "{%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The first product of a chain.
__device__ __forceinline__ void amx_mma_first(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
               "{%8, %9}, {%10, %10, %10, %10};"
               : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}
#endif
"""

TEXT = COMMON + _MEMORY + _MMA


def call(name: str, *args, returns: str = "void", text: str = TEXT):
    """Call a CUDA function; an expression when it returns something, else a statement."""
    expression = T.cuda.func_call(name, *args, source_code=text, return_type=returns)
    if returns == "void":
        T.evaluate(expression)
        return None
    return expression


def at(buffer: tirx.Buffer, *index) -> tirx.Expr:
    """Address of an element."""
    return T.address_of(buffer[index if len(index) > 1 else index[0]])


def local(size: int, dtype: str = "float32") -> tirx.Buffer:
    """Allocate registers of the current block.

    TVM shrinks a buffer to the elements whose addresses it sees, and a function that is given the
    address of element i may write i + 1: a (dead) store to the last element keeps the size.
    """
    size = max(size, 1)
    buffer = T.sblock_alloc_buffer((size,), dtype, scope="local")
    T.buffer_store(buffer, tirx.const(0, dtype), [size - 1])
    return buffer


def format_text(decode: FragmentDecode) -> str:
    """All CUDA text that a kernel of a format may call."""
    name = decode.ident
    second = "amx_mma(acc + 4, r, b0, b1);" if decode.chains == 2 else ""
    second_first = second.replace("amx_mma", "amx_mma_first")
    scaling = ""
    if decode.shape.group:

        def add(out: str, index: str) -> str:
            """Add one sum, scaled; two multiply-adds in a row."""
            lines = f"{out} = fmaf(alpha[h], acc[{index}], {out});"
            if decode.chains == 2:
                lines += f" {out} = fmaf(beta[h], acc[4 + {index}], {out});"
            return lines

        scaling = f"""
// out[4] += sums of one group of the lane: c0, c1 in row g, c2, c3 in row g + 8 (M <= 8, plain
// form)
__device__ __forceinline__ void amx_scale_plain_{name}(float* out, const float* acc, const unsigned* rec,
                                                       int group) {{
  float alpha[2], beta[2];
  amx_coef_{name}(rec, group, alpha, beta);
#pragma unroll
  for (int h = 0; h < 2; ++h) {{
    {add("out[2 * h]", "2 * h")}
    {add("out[2 * h + 1]", "2 * h + 1")}
  }}
}}
// out[2] += sums of two groups of the lane: c0 is group 0, c1 group 1 (block-diagonal form)
__device__ __forceinline__ void amx_scale_diagonal_{name}(float* out, const float* acc,
                                                          const unsigned* rec) {{
#pragma unroll
  for (int group = 0; group < 2; ++group) {{
    float alpha[2], beta[2];
    amx_coef_{name}(rec, group, alpha, beta);
#pragma unroll
    for (int h = 0; h < 2; ++h) {{ {add("out[h]", "2 * h + group")} }}
  }}
}}"""
    prepare = f"amx_hcoef_{name}(rec, group, a, b);" if decode.shape.group else ""
    return f"""{TEXT}
#ifndef AMX_FORMAT_{name}
#define AMX_FORMAT_{name}
{decode.text}
// one step of 16 columns into the chains' accumulators; FIRST starts new chains
template <bool FIRST>
__device__ __forceinline__ void amx_step_{name}(float* acc, const unsigned* w, unsigned b0, unsigned b1) {{
  unsigned q[4], r[4];
  amx_first_{name}(w, q, r);
  if constexpr (FIRST) {{
    amx_mma_first(acc, q, b0, b1); {second_first}
  }} else {{
    amx_mma(acc, q, b0, b1); {second}
  }}
}}{scaling}
// one step of 16 columns, scaled in registers, times TILES tiles of 8 rows of x (M > 8)
template <int TILES>
__device__ __forceinline__ void amx_wide_{name}(float* acc, const unsigned* w, const unsigned* rec, int group,
                                                const unsigned* x, int stride) {{
  unsigned a = 0u, b = 0u, r[4];
  {prepare}
  amx_half_{name}(w, a, b, r);
#pragma unroll
  for (int i = 0; i < TILES; ++i) amx_mma(acc + 4 * i, r, x[i * stride], x[i * stride + 1]);
}}
#endif
"""
