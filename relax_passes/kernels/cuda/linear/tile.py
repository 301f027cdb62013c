"""Schedule for M > 8: W decoded and scaled in registers, x shared through shared memory.

A block computes `groups` * 64 rows of W by `block_m` rows of x. Each warp owns 16 rows of W (one
tile of the packed layout) in all columns; K runs in stages of 64 columns through a ring in shared
memory:

    x       [stages][block_m][64 columns], 128-byte rows, swizzled (see intrinsics/tiles.py)
    codes   [stages][warps][units of a stage][512 bytes]
    scales  [stages][warps][units of a stage][8 * record bytes]

Two engines share the rest: tile_wgmma (sm_90a) and tile_mma (everything from sm_80 on). Where row
tiles alone are too few for the multiprocessors, `cluster` blocks split K and sum their float32
tiles through distributed shared memory (sm_90 and later). `share` blocks with the same rows of x
each request a part of them from the L2 cache, for all (wgmma): x is read again by every block of
128 rows of W, and from M = 64 on that is more than W's own bytes. Both kinds of neighbours form one
cluster, split in x and shared in y. The finished tile goes through shared memory, transposed to
[row of x][row of W], so that y is written in whole sectors.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from amx_tvm.targets.cuda.gpus import Gpu

from . import experts
from .buffers import Linear
from .tile_mma import MmaTile
from .tile_persistent import PersistentTile
from .tile_plan import TileKnobs
from .tile_wgmma import WgmmaTile, tensor_maps

__all__ = ["TileKnobs", "emit"]


def emit(linear: Linear, knobs: TileKnobs, gpu: Gpu) -> None:
    """Emit the kernel; any number of rows of x, in blocks of `block_m`."""
    walks = knobs.wgmma and knobs.producer and knobs.cluster == 1 and knobs.block_m >= 64
    if knobs.persistent and not walks:
        raise ValueError(
            f"persistent blocks want wgmma, a producer, cluster 1 and 64 rows of x, not {knobs}"
        )
    if knobs.wgmma and not knobs.persistent and knobs.stages % 2:
        # the sets of registers for codes and scales alternate with the slots
        raise ValueError(f"with wgmma a ring has an even number of stages, not {knobs.stages}")
    if knobs.e4m3 and (not knobs.wgmma or knobs.parallel > 1 or linear.x_codes is None):
        raise ValueError(f"E4M3 wants wgmma, a step at a time, and x in E4M3: {knobs}")
    if linear.spec.experts and knobs.persistent:
        raise ValueError(f"persistent blocks do not walk over experts: {knobs}")
    if linear.spec.gathered and knobs.wgmma:
        raise ValueError(f"the copy engine gathers no rows: {knobs}")
    if knobs.block_m % knobs.cluster or knobs.cluster * knobs.share > 8:
        raise ValueError(
            f"a cluster has at most 8 blocks, and those that split K divide the rows of x: {knobs}"
        )
    n_tiles = -(-linear.tiles * 16 // (knobs.groups * 64))
    n_tiles = -(-n_tiles // knobs.share) * knobs.share
    m_tiles = (linear.m + knobs.block_m - 1) // knobs.block_m
    if linear.spec.experts:
        m_tiles = experts.items(linear, knobs.block_m)
    split = knobs.cluster > 1
    # both kinds of neighbours lie in x then: TVM 0.27 cannot have clusters of one and of two
    # dimensions in a module
    beside = knobs.share if split else 1
    maps = tensor_maps(linear, knobs) if knobs.wgmma else None
    blocks = gpu.multiprocessors // knobs.share * knobs.share
    in_y, in_x = n_tiles // beside, m_tiles * (knobs.cluster * beside)
    if knobs.persistent:
        in_y, in_x = blocks, 1
    threads = [
        T.thread_binding(in_y, thread="blockIdx.y"),
        T.thread_binding(in_x, thread="blockIdx.x"),
        T.thread_binding(knobs.warps, thread="threadIdx.y"),
        T.thread_binding(32, thread="threadIdx.x"),
    ]
    # launch attributes: consecutive blocks form a cluster
    if split:
        threads.insert(2, T.thread_binding(knobs.cluster * beside, thread="clusterCtaIdx.x"))
    elif knobs.share > 1:
        threads.insert(2, T.thread_binding(knobs.share, thread="clusterCtaIdx.y"))
    with T.frame_scope(threads) as bound:
        with T.sblock("linear"):
            T.reads()
            T.writes()
            by, bx, ty, tx = bound[0], bound[1], bound[-2], bound[-1]
            m_tile = bx // (knobs.cluster * beside) if split else bx
            if linear.spec.experts:
                # here a row is counted from the first of all
                found = experts.take(linear, m_tile, knobs.block_m, tx, knobs.dependent)
                linear = found.with_rows(found.y_row(found.m))
                knobs = replace(knobs, dependent=False)
            if knobs.persistent and maps is not None:
                _run(PersistentTile(linear, knobs, gpu, maps, by, blocks, lane=tx, warp=ty))
                return
            place = {
                "lane": tx,
                "warp": ty,
                "n_tile": by if beside == 1 else by * beside + bx // knobs.cluster % beside,
                "m_tile": m_tile,
                "rank": bx % knobs.cluster if split else tirx.const(0, "int32"),
            }
            if maps is not None:
                _run(WgmmaTile(linear, knobs, gpu, maps, **place))
            else:
                MmaTile(linear, knobs, **place).run()


def _run(engine: WgmmaTile) -> None:
    """Emit a block whose registers leave room for as many of its kind as it says.

    ptxas keeps to that, and without a promise it ignores setmaxnreg.
    """
    with T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", engine.blocks):
        engine.run()
