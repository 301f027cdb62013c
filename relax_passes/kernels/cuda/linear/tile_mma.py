"""Tile schedule with mma.sync and cp.async: every GPU from sm_80 on.

A ring of `stages` slots; iteration k waits for its stage, refills the slot of stage k - 1, decodes
the warp's codes into scaled A registers and multiplies them with x through ldmatrix.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..intrinsics.base import at, local
from ..intrinsics.memory import COPY_COMMIT, COPY_WAIT
from ..intrinsics.sync import BARRIER, LAUNCH_DEPENDENTS, WAIT_PREREQUISITES
from ..intrinsics.tiles import COPY_W, COPY_X, GATHER_X, TILE_MMA, stage_words
from .buffers import Linear
from .tile_block import TileBlock
from .tile_plan import TileKnobs


class MmaTile(TileBlock):
    """Emits one block's work with mma.sync."""

    def __init__(self, linear: Linear, knobs: TileKnobs, **place):
        super().__init__(linear, knobs, extra_bytes=0, **place)
        self.a = local(16, "uint32")
        words, records = stage_words(linear.decode, knobs.columns)
        self.words, self.records = local(words, "uint32"), local(records, "uint32")

    def _copy_w(self, k, slot) -> None:
        """Request a warp's codes and scales of local stage k."""
        linear = self.linear
        zero = tirx.const(0, "int32")
        scales = linear.codes if linear.scales is None else linear.scales
        COPY_W[self.units, self.warp_scales](
            self.codes_at(slot),
            self.scales_at(slot),
            at(linear.codes, self.tile, zero, zero),
            at(scales, self.tile, zero, zero),
            (self.first + k) * self.units,
            linear.units - 1,
            self.lane,
        )

    def _copy_x(self, k, slot) -> None:
        """Request the block's rows of x of local stage k, and close the stage's group."""
        linear = self.linear
        zero = tirx.const(0, "int32")
        given = [at(linear.x, zero, zero)]
        copy = COPY_X if linear.source is None else GATHER_X
        if linear.source is not None:
            given.append(at(linear.source, zero))
        copy[self.knobs.block_m, self.threads, linear.spec.k](
            self.x_at(slot),
            *given,
            linear.m,
            self.m0,
            (self.first + k) * self.knobs.columns,
            self.tid,
        )
        COPY_COMMIT()

    def _copy(self, k) -> None:
        """Request local stage k, or close an empty group beyond the last."""
        slot = k % self.knobs.stages
        with T.If(k < self.iterations):
            with T.Then():
                self._copy_w(k, slot)
                self._copy_x(k, slot)
            with T.Else():
                COPY_COMMIT()

    def run(self) -> None:
        """Emit the whole block."""
        stages, dependent = self.knobs.stages, self.knobs.dependent
        if dependent:
            LAUNCH_DEPENDENTS()
        for k in range(min(stages - 1, self.iterations)):
            self._copy_w(tirx.const(k, "int32"), k)
        if dependent:
            WAIT_PREREQUISITES()
        for k in range(stages - 1):
            if k < self.iterations:
                self._copy_x(tirx.const(k, "int32"), k)
            else:
                COPY_COMMIT()
        for i in range(self.knobs.block_m // 2):
            T.buffer_store(self.acc, tirx.const(0.0, "float32"), [i])
        with T.serial(self.iterations, annotations={"disable_unroll": True}) as k:
            COPY_WAIT[stages - 2]()
            BARRIER()
            self._copy(k + stages - 1)
            self.read_slot(self.words, self.records, k % stages, 0)
            for step in range(4):
                self.decode_step(at(self.a, 4 * step), self.words, self.records, 0, step)
            xs = self.x_at(k % stages)
            TILE_MMA[self.knobs.block_m](at(self.acc, 0), at(self.a, 0), xs, self.lane)
        COPY_WAIT[0]()
        self.finish()
