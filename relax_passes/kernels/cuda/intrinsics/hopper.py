# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""What sm_90a adds: wgmma, the copy engine, and mbarriers in shared memory.

Operands of wgmma in shared memory lie in the 128-byte swizzle (tiles.py).
"""

from __future__ import annotations

from functools import cache

from .base import Intrinsic

# Lower word of the descriptor of a K-major operand in the 128-byte swizzle; the upper one is
# constant: 8 rows of 128 bytes are 1024 bytes apart. 16 columns further is 2 more (in 16 bytes).
WGMMA_OPERAND = Intrinsic(
    "amx_wgmma_operand",
    "  return ((a & 0x3FFFF) >> 4) | (1u << 16);",
    signature="unsigned(unsigned a)",
    meaning=lambda a: (a & 0x3FFFF) >> 4 | 1 << 16,
)
# Without effect in a kernel that does not promise its blocks a multiprocessor (tile.emit).
MORE_REGISTERS, FEWER_REGISTERS = (
    Intrinsic(
        f"amx_wgmma_{word}_registers",
        f'  asm volatile("setmaxnreg.{step}.sync.aligned.u32 %0;" :: "n"(N));',
        template="int N",
    )
    for word, step in (("more", "inc"), ("fewer", "dec"))
)
# All groups of products but the last N have ended.
WGMMA_WAIT = Intrinsic(
    "amx_wgmma_wait",
    '  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");',
    template="int N",
)


@cache
def wgmma(columns: int, e4m3: bool = False) -> Intrinsic:
    """Products of 64 rows of W (registers) by `columns` rows of x (shared memory), 32 bytes deep.

    That is 16 columns of float16 or 32 of E4M3. COUNT of them, from the STEP-th of a stage on, are
    one group for `WGMMA_WAIT[N]`, which frees the registers of W of all groups but the last N.
    """
    kind, flags = ("k32.f32.e4m3.e4m3", "1, 1, 1") if e4m3 else ("k16.f32.f16.f16", "1, 1, 1, 0")
    count = columns // 2
    outs = ", ".join(f"%{i}" for i in range(count))
    ins = ", ".join(f"%{count + i}" for i in range(4))
    operands = ", ".join(f'"+f"(c[{i}])' for i in range(count))
    return Intrinsic(
        f"amx_tile_wgmma_{columns}" + ("_e4m3" if e4m3 else ""),
        f"""
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 4 * COUNT; i += 4) {{
    const unsigned long long b = (1ull << 62) | (64ull << 32) | (operand + 2 * STEP + i / 2);
    asm volatile("wgmma.mma_async.sync.aligned.m64n{columns}{kind} {{{outs}}}, "
                 "{{{ins}}}, %{count + 4}, {flags};"
                 : {operands}
                 : "r"(a[i]), "r"(a[i + 1]), "r"(a[i + 2]), "r"(a[i + 3]), "l"(b));
  }}
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");""",
        signature="void(float* c, const unsigned* a, unsigned operand)",
        template="int STEP, int COUNT",
    )


# True in one lane of a whole warp.
ELECT = Intrinsic(
    "amx_elect",
    r"""
  unsigned elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;""",
    signature="bool()",
)
INIT_BARRIER = Intrinsic(
    "amx_init_barrier",
    '  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(count) : "memory");',
    signature="void(unsigned b, unsigned count)",
)
# The barriers are there for the copy engine and for the cluster.
INIT_DONE = Intrinsic(
    "amx_init_done",
    """
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");""",
)
EXPECT = Intrinsic(
    "amx_expect",
    '  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(bytes) : "memory");',
    signature="void(unsigned b, unsigned bytes)",
)
# Lane 0 arrives where `wanted`; without a branch, which ptxas takes for the end of a pipeline.
ARRIVE_LANE0 = Intrinsic(
    "amx_arrive_lane0",
    r"""
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}"
               :: "r"(b), "r"((int)(wanted && lane == 0)) : "memory");""",
    signature="void(unsigned b, bool wanted, int lane)",
)
# Lane i < COUNT arrives at the barrier of the cluster's block first + i * STEP. What was read has
# arrived in registers; a release at the cluster's scope would wait for all of memory.
ARRIVE_PEERS = Intrinsic(
    "amx_arrive_peers",
    r"""
  asm volatile("{\n.reg .b32 r;\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n"
               "mapa.shared::cluster.u32 r, %0, %1;\n"
               "@p mbarrier.arrive.shared::cluster.b64 _, [r];\n}"
               :: "r"(b), "r"(first + (lane < COUNT ? lane : 0) * STEP), "r"((int)(wanted && lane < COUNT))
               : "memory");""",
    signature="void(unsigned b, int first, bool wanted, int lane)",
    template="int COUNT, int STEP",
)
WAIT_BARRIER = Intrinsic(
    "amx_wait_barrier",
    r"""
  asm volatile("{\n.reg .pred p;\nW_%=:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
               "@p bra D_%=;\nbra W_%=;\nD_%=:\n}"
               :: "r"(b), "r"(parity) : "memory");""",
    signature="void(unsigned b, unsigned parity)",
)
TMA_PREFETCH = Intrinsic(
    "amx_tma_prefetch",
    '  asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");',
    signature="void(unsigned long long map)",
)


def _tma(dimensions: int, shared: bool = False) -> Intrinsic:
    """Copy a box of a tensor, its corner at the coordinates c0 (innermost).. ."""
    coordinates = [f"c{i}" for i in range(dimensions)]
    places = ", ".join(f"%{2 + i}" for i in range(dimensions))
    inputs = ", ".join(f'"r"({c})' for c in coordinates)
    barrier = 2 + dimensions
    kind = ".multicast::cluster" if shared else ""
    mask_place, mask_input = (f", %{barrier + 1}", ', "h"((short)mask)') if shared else ("", "")
    parameters = ", ".join(f"int {c}" for c in coordinates)
    mask = ", int mask" if shared else ""
    return Intrinsic(
        f"amx_tma_{dimensions}d" + ("_shared" if shared else ""),
        f"""
  asm volatile("cp.async.bulk.tensor.{dimensions}d.shared::cluster.global.mbarrier::complete_tx::bytes{kind} "
               "[%0], [%1, {{{places}}}], [%{barrier}]{mask_place};"
               :: "r"(dst), "l"(map), {inputs}, "r"(b){mask_input} : "memory");""",
        signature=f"void(unsigned dst, unsigned long long map, {parameters}, unsigned b{mask})",
    )


TMA = {n: _tma(n) for n in (2, 3)}
# The same bytes to the same place in every block of the cluster that the mask names.
TMA_2D_SHARED = _tma(2, shared=True)
