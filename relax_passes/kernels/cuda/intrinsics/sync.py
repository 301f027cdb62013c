# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""Waiting: in a warp, a warpgroup, a block, a cluster, and for the kernel before."""

from __future__ import annotations

import numpy as np

from .base import Intrinsic
from .memory import COPY_WAIT

WARP_SYNC = Intrinsic("amx_warp_sync", "  __syncwarp();")
BARRIER = Intrinsic("amx_barrier", "  __syncthreads();")
# The first THREADS of a block, which are whole warps; barrier 0 is the block's.
BARRIER_OF = Intrinsic(
    "amx_barrier_of",
    '  asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory");',
    template="int THREADS",
)
# The warps of a warpgroup.
GROUP_BARRIER = Intrinsic(
    "amx_group_barrier",
    '  asm volatile("bar.sync %0, 128;" :: "r"(1 + group) : "memory");',
    signature="void(int group)",
)
# All groups of copies but the last N are there, for all lanes.
FETCH_WAIT = Intrinsic(
    "amx_fetch_wait", "  amx_copy_wait<N>();\n  __syncwarp();", (COPY_WAIT,), template="int N"
)

LAUNCH_DEPENDENTS = Intrinsic(
    "amx_launch_dependents",
    """
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif""",
)
# A loop that ends at once (no grid has 0 blocks): in straight code ptxas 13.0 moves loads of weights
# that stand before the wait behind it.
WAIT_PREREQUISITES = Intrinsic(
    "amx_wait_prerequisites",
    r"""
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %0, 0;\nG_%=:\ngriddepcontrol.wait;\n@p bra G_%=;\n}"
               :: "r"(gridDim.z) : "memory");
#endif""",
)

CLUSTER_SYNC = Intrinsic(
    "amx_cluster_sync",
    r"""
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif""",
)
# The same in two halves, for what does not depend on the others.
CLUSTER_ARRIVE = Intrinsic(
    "amx_cluster_arrive",
    r"""
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif""",
)
CLUSTER_WAIT = Intrinsic(
    "amx_cluster_wait",
    r"""
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif""",
)
# All are there; says nothing of what they wrote.
CLUSTER_MEET = Intrinsic(
    "amx_cluster_meet",
    r"""
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif""",
)


def _peer(count: int) -> Intrinsic:
    """Floats of shared memory of the cluster's block `rank`, at an address of the own one."""
    parts = "xyzw"[:count]
    places = ", ".join(f"%{i}" for i in range(count))
    outs = ", ".join(f'"=f"(v.{part})' for part in parts)
    zeros = ", ".join("0.f" for _ in parts)
    return Intrinsic(
        f"amx_peer{count}",
        f"""
  float{count} v = make_float{count}({zeros});
#if __CUDA_ARCH__ >= 900
  unsigned p;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(p) : "r"(a), "r"(rank));
  asm volatile("ld.shared::cluster.v{count}.f32 {{{places}}}, [%{count}];" : {outs} : "r"(p) : "memory");
#endif
  return v;""",
        signature=f"float{count}(unsigned a, unsigned rank)",
    )


PEER = {n: _peer(n) for n in (2, 4)}

# The warp's value, which the compiler then knows to be alike in all lanes.
UNIFORM = Intrinsic(
    "amx_uniform",
    "  return __shfl_sync(0xffffffffu, v, 0);",
    signature="int(int v)",
    meaning=lambda v: np.broadcast_to(v[0], v.shape),
)
# The sum of a lane's value and of the lane's whose number differs in a bit.
SHUFFLE_ADD = Intrinsic(
    "amx_shuffle_add",
    "  return v + __shfl_xor_sync(0xffffffffu, v, mask);",
    signature="float(float v, int mask)",
    meaning=lambda v, mask: v + v[np.arange(32) ^ mask],
)
