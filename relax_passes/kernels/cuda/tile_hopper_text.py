# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""CUDA text of what sm_90a adds to the tile schedule: wgmma, the copy engine, clusters.

Barriers are mbarriers in shared memory; operands lie in the 128-byte swizzle (tile_text.py).
"""

from __future__ import annotations

WGMMA = r"""
#ifndef AMX_WGMMA
#define AMX_WGMMA
// Lower word of the descriptor of a K-major operand in the 128-byte swizzle; the upper one is
// constant: 8 rows of 128 bytes are 1024 bytes apart. 16 columns further is 2 more (in 16 bytes).
__device__ __forceinline__ unsigned amx_wgmma_operand(unsigned a) {
  return ((a & 0x3FFFF) >> 4) | (1u << 16);
}
// Without effect in a kernel that does not promise its blocks a multiprocessor (tile.emit).
template <int N> __device__ __forceinline__ void amx_wgmma_more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
}
template <int N> __device__ __forceinline__ void amx_wgmma_fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
}
template <int N> __device__ __forceinline__ void amx_wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}
#endif
"""

TMA = r"""
#ifndef AMX_TMA
#define AMX_TMA
// True in one lane of a whole warp.
__device__ __forceinline__ bool amx_elect() {
  unsigned elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
}
__device__ __forceinline__ void amx_init_barrier(unsigned b, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(count) : "memory");
}
__device__ __forceinline__ void amx_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void amx_expect(unsigned b, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(bytes) : "memory");
}
// Lane 0 arrives where `wanted`; without a branch, which ptxas takes for the end of a pipeline.
__device__ __forceinline__ void amx_arrive_lane0(unsigned b, bool wanted, int lane) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}"
               :: "r"(b), "r"((int)(wanted && lane == 0)) : "memory");
}
// Lane i < COUNT arrives at the barrier of the cluster's block first + i * STEP. What was read has
// arrived in registers; a release at the cluster's scope would wait for all of memory.
template <int COUNT, int STEP>
__device__ __forceinline__ void amx_arrive_peers(unsigned b, int first, bool wanted, int lane) {
  asm volatile("{\n.reg .b32 r;\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n"
               "mapa.shared::cluster.u32 r, %0, %1;\n"
               "@p mbarrier.arrive.shared::cluster.b64 _, [r];\n}"
               :: "r"(b), "r"(first + (lane < COUNT ? lane : 0) * STEP), "r"((int)(wanted && lane < COUNT))
               : "memory");
}
__device__ __forceinline__ void amx_wait_barrier(unsigned b, unsigned parity) {
  asm volatile("{\n.reg .pred p;\nW_%=:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
               "@p bra D_%=;\nbra W_%=;\nD_%=:\n}"
               :: "r"(b), "r"(parity) : "memory");
}
__device__ __forceinline__ void amx_tma_prefetch(unsigned long long map) {
  asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}
__device__ __forceinline__ void amx_tma_2d(unsigned dst, unsigned long long map, int c0, int c1, unsigned b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3}], [%4];"
               :: "r"(dst), "l"(map), "r"(c0), "r"(c1), "r"(b) : "memory");
}
// The same bytes to the same place in every block of the cluster that the mask names.
__device__ __forceinline__ void amx_tma_2d_shared(unsigned dst, unsigned long long map, int c0, int c1,
                                                  unsigned b, int mask) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
               ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
               :: "r"(dst), "l"(map), "r"(c0), "r"(c1), "r"(b), "h"((short)mask) : "memory");
}
__device__ __forceinline__ void amx_tma_3d(unsigned dst, unsigned long long map, int c0, int c1, int c2,
                                           unsigned b) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3, %4}], [%5];"
               :: "r"(dst), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(b) : "memory");
}
#endif
"""

CLUSTER = r"""
#ifndef AMX_CLUSTER
#define AMX_CLUSTER
__device__ __forceinline__ unsigned amx_cluster_rank() {
  unsigned r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r;
}
__device__ __forceinline__ void amx_cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// All are there; says nothing of what they wrote.
__device__ __forceinline__ void amx_cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ float4 amx_peer4(unsigned a, unsigned rank) {
  unsigned p; float4 v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(p) : "r"(a), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(p) : "memory");
  return v;
}
#endif
"""


def wgmma_text(columns: int) -> str:
    """Products of 64 rows of W (registers) by `columns` rows of x (shared memory), 16 deep each.

    COUNT of them, from column 16 STEP of a stage on, are one group for `amx_wgmma_wait<N>`, which
    frees the registers of W of all groups but the last N.
    """
    count = columns // 2
    outs = ", ".join(f"%{i}" for i in range(count))
    ins = ", ".join(f"%{count + i}" for i in range(4))
    operands = ", ".join(f'"+f"(c[{i}])' for i in range(count))
    return f"""{WGMMA}
#ifndef AMX_WGMMA_{columns}
#define AMX_WGMMA_{columns}
template <int STEP, int COUNT>
__device__ __forceinline__ void amx_tile_wgmma_{columns}(float* c, const unsigned* a, unsigned operand) {{
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 4 * COUNT; i += 4) {{
    const unsigned long long b = (1ull << 62) | (64ull << 32) | (operand + 2 * STEP + i / 2);
    asm volatile("wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {{{outs}}}, "
                 "{{{ins}}}, %{count + 4}, 1, 1, 1, 0;"
                 : {operands}
                 : "r"(a[i]), "r"(a[i + 1]), "r"(a[i + 2]), "r"(a[i + 3]), "l"(b));
  }}
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}}
#endif
"""
