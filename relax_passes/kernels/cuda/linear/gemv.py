"""Decode schedule for M <= 16: weight fragments straight from device memory into mma.sync.

A warp computes `tiles` tiles of 16 rows of W over a part of K; the warps of a block split K and
meet in shared memory (gate and up are the two tiles of a warp with silu_mul). The tensor core's
16-row operand is W, its 8 columns are filled from x in one of two ways:

    plain (GP = 1)           column n is row n of x; scales are applied after every group
    block-diagonal (GP > 1)  column n is row n // GP of x in group n % GP of GP consecutive groups,
    zero
                             in the others: one pair of chains runs over all GP groups, column n
                             ends up with group n's sum, and scales are applied once per GP groups.
                             Exact: only zeros are added. GP = 8 / M where K has that many groups,
                             or less (`diagonal`).

The GP groups of 8 columns are a *superblock*: 8 x group values of x, 16 bytes a lane for groups of
32. Each warp copies its own superblocks to its own shared memory and reads them back with one
ldmatrix: lane (g, t) brings 16-byte piece t of column g to place  8 t + (g ^ 2 t), free of bank
conflicts both ways.

For M = 9..16 (plain only, two tiles of 8 columns), and below with `scaled_weights`, the scales are
applied to the weights in registers and one chain runs over all of K: a second chain would cost more
than touching every weight. At M = 8 the two cost about as much, and which is faster depends on the
shape.

K is walked in *chunks* (the larger of a unit and a superblock). A warp takes every `warps`-th batch
of chunks, all of a batch's weights are in flight at once, and batch 0 is requested before the
activations are waited for (programmatic dependent launch). With two buffers a batch is requested
while the one before it is multiplied. (Loading each unit into the registers of the one that was
multiplied just now looks better and is not: ptxas waits for the oldest load by a counter that the
youngest shares.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..intrinsics.base import at
from ..intrinsics.sync import SHUFFLE_ADD
from . import epilogue, experts
from .buffers import Linear
from .gemv_plan import GemvKnobs, Plan, plan_of
from .gemv_warp import Warp

__all__ = ["GemvKnobs", "emit"]


@dataclass(frozen=True)
class _Partial:
    """The warps' sums in shared memory, [tile][warp][row of x][row of W]."""

    shared: tirx.Buffer
    first: int
    warps: int
    outputs: int

    def _index(self, tile, warp, place):
        return self.first + (tile * self.warps + warp) * self.outputs + place

    def store(self, tile, warp, place, value) -> None:
        """Write one sum."""
        T.buffer_store(self.shared, value, [self._index(tile, warp, place)])

    def load(self, tile, warp, place) -> tirx.Expr:
        """Read one sum."""
        return self.shared[self._index(tile, warp, place)]


def _publish(worker: Warp, partial: _Partial) -> None:
    """Write the warp's sums, [tile][warp][row of x][row of W], to shared memory."""
    for i in range(worker.knobs.tiles):
        _publish_tile(worker, partial, i)


def _publish_tile(worker: Warp, partial: _Partial, tile: int) -> None:
    plan = worker.plan
    if plan.gp == 1:
        in_out = worker.scaled and not worker.wide
        source, first = (worker.out, 4 * tile) if in_out else (worker.acc, worker.sums * tile)
        for i in range(4 * plan.column_tiles):
            row = 2 * worker.t + i % 2 + 8 * (i // 4)
            with T.If(row < plan.rows):
                with T.Then():
                    place = row * 16 + worker.g + 8 * (i // 2 % 2)
                    partial.store(tile, worker.warp, place, source[first + i])
        return
    out = [2 * tile, 2 * tile + 1]
    for mask in (1, 2):
        if mask * 2 < plan.gp:
            for o in out:
                total = SHUFFLE_ADD(worker.out[o], mask)
                T.buffer_store(worker.out, total, [o])
    row = 2 * worker.t // plan.gp
    with T.If(tirx.And(tirx.EQ(2 * worker.t % plan.gp, 0), row < plan.rows)):
        with T.Then():
            for h, o in enumerate(out):
                partial.store(tile, worker.warp, row * 16 + worker.g + 8 * h, worker.out[o])


def emit(linear: Linear, rows: int, knobs: GemvKnobs) -> None:
    """Emit the kernel for up to `rows` (1, 2, 4, 8 or 16) rows of x."""
    plan = plan_of(linear, rows, knobs)
    warps, tiles = knobs.warps, knobs.tiles
    threads = [
        T.thread_binding(-(-linear.tiles // tiles), thread="blockIdx.x"),
        T.thread_binding(warps, thread="threadIdx.y"),
        T.thread_binding(32, thread="threadIdx.x"),
    ]
    if linear.spec.experts:
        threads.insert(1, T.thread_binding(experts.items(linear, rows), thread="blockIdx.y"))
    with T.frame_scope(threads) as bound:
        with T.sblock("linear"):
            T.reads()
            T.writes()
            block, ty, tx = bound[0], bound[-2], bound[-1]
            # One buffer: TVM would give two that it thinks never live together the same bytes,
            # while slower warps still read x. The sums lie behind the warps' pieces of x, or in
            # their place after a barrier where both together would pass 48 KB.
            words, sums = plan.buffers * plan.operands * 8 * 4, tiles * warps * 16 * rows
            overlaid = (warps * words + sums + 1) * 4 > 49152
            size = max(warps * words, sums) if overlaid else warps * words + sums
            noted, size = size, size + experts.noted_floats(linear.spec)
            # the last element is used by nobody: a store to it keeps the size (see
            # intrinsics/base.py, local)
            shared = T.sblock_alloc_buffer((size + 1,), "float32", scope="shared.dyn")
            T.buffer_store(shared, tirx.const(0.0, "float32"), [size])
            if linear.spec.chosen:
                linear = experts.choose(linear, bound[1], shared, noted, ty * 32 + tx, knobs)
                knobs = replace(knobs, dependent=knobs.dependent and linear.spec.joined)
            elif linear.spec.experts:
                linear = experts.take(linear, bound[1], rows, tx, knobs.dependent)
                knobs = replace(knobs, dependent=False)
            partial = _Partial(shared, 0 if overlaid else warps * words, warps, 16 * rows)
            stage = at(shared, ty * words)
            worker = Warp(linear, plan, knobs, block, ty, tx, stage)
            worker.run()
            if overlaid:
                T.evaluate(T.tvm_storage_sync("shared"))
            _publish(worker, partial)
            T.evaluate(T.tvm_storage_sync("shared"))
            _reduce(linear, plan, knobs, partial, block, ty * 32 + tx)


def _reduce(linear: Linear, plan: Plan, knobs: GemvKnobs, partial, block, thread) -> None:
    """Sum the warps' parts and write y."""
    threads = knobs.warps * 32
    factor = linear.decode.half_factor if plan.wide else linear.decode.factor
    gated = linear.spec.silu_mul
    pairs = knobs.tiles // 2 if gated else knobs.tiles
    outputs = 16 * plan.rows * pairs

    def total(tile, index) -> tirx.Expr:
        value = partial.load(tile, 0, index)
        for w in range(1, knobs.warps):
            value = value + partial.load(tile, w, index)
        return value

    for first in range(0, outputs, threads):
        flat = thread + first
        pair, index = flat // (16 * plan.rows), flat % (16 * plan.rows)
        row, tile_row = index // 16, index % 16
        with T.If(tirx.And(flat < outputs, row < linear.m)):
            with T.Then():
                tile = pair * 2 if gated else pair
                packed_row = (block * knobs.tiles + tile) * 16 + tile_row
                value = epilogue.finish(linear, total(tile, index), packed_row, factor)
                if gated:
                    up = epilogue.finish(linear, total(tile + 1, index), packed_row + 16, factor)
                    value = epilogue.gated(linear, value, up)
                epilogue.store(linear, row, (block * pairs + pair) * 16 + tile_row, value)
