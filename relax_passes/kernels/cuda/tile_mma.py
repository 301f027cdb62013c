"""Tile schedule with mma.sync and cp.async: every GPU from sm_80 on.

A ring of `stages` slots; iteration k waits for its stage, refills the slot of stage k - 1, decodes
the warp's codes into scaled A registers and multiplies them with x through ldmatrix.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from .buffers import Linear
from .intrinsics import at, local
from .tile_block import TileBlock
from .tile_plan import STAGE_COLUMNS, TileKnobs
from .tile_text import stage_words


class MmaTile(TileBlock):
    """Emits one block's work with mma.sync."""

    def __init__(self, linear: Linear, knobs: TileKnobs, **place):
        super().__init__(linear, knobs, extra_bytes=0, **place)
        self.a = local(16, "uint32")
        words, records = stage_words(linear.decode)
        self.words, self.records = local(words, "uint32"), local(records, "uint32")

    def _copy_w(self, k, slot) -> None:
        """Request a warp's codes and scales of local stage k."""
        linear = self.linear
        zero = tirx.const(0, "int32")
        scales = linear.codes if linear.scales is None else linear.scales
        self.do(
            f"amx_copy_w<{self.units}, {self.warp_scales}>",
            self.codes_at(slot),
            self.scales_at(slot),
            at(linear.codes, self.tile, zero, zero),
            at(scales, self.tile, zero, zero),
            (self.first + k) * self.units,
            tirx.const(linear.units - 1, "int32"),
            self.lane,
        )

    def _copy_x(self, k, slot) -> None:
        """Request the block's rows of x of local stage k, and close the stage's group."""
        linear = self.linear
        zero = tirx.const(0, "int32")
        self.do(
            f"amx_copy_x<{self.knobs.block_m}, {self.threads}, {linear.spec.k}>",
            self.x_at(slot),
            at(linear.x, zero, zero),
            linear.m,
            self.m0,
            (self.first + k) * STAGE_COLUMNS,
            self.tid,
        )
        self.do("amx_copy_commit")

    def _copy(self, k) -> None:
        """Request local stage k, or close an empty group beyond the last."""
        slot = k % self.knobs.stages
        with T.If(k < self.iterations):
            with T.Then():
                self._copy_w(k, slot)
                self._copy_x(k, slot)
            with T.Else():
                self.do("amx_copy_commit")

    def run(self) -> None:
        """Emit the whole block."""
        stages, dependent = self.knobs.stages, self.knobs.dependent
        if dependent:
            self.do("amx_launch_dependents")
        for k in range(min(stages - 1, self.iterations)):
            self._copy_w(tirx.const(k, "int32"), k)
        if dependent:
            self.do("amx_wait_prerequisites")
        for k in range(stages - 1):
            if k < self.iterations:
                self._copy_x(tirx.const(k, "int32"), k)
            else:
                self.do("amx_copy_commit")
        for i in range(self.knobs.block_m // 2):
            T.buffer_store(self.acc, tirx.const(0.0, "float32"), [i])
        with T.serial(self.iterations, annotations={"disable_unroll": True}) as k:
            self.do(f"amx_copy_wait<{stages - 2}>")
            self.do("amx_barrier")
            self._copy(k + stages - 1)
            self.read_slot(self.words, self.records, k % stages, 0)
            for step in range(4):
                self.decode_step(at(self.a, 4 * step), self.words, self.records, 0, step)
            xs = self.x_at(k % stages)
            name = f"amx_tile_mma<{self.knobs.block_m}>"
            self.do(name, at(self.acc, 0), at(self.a, 0), xs, self.lane)
        self.do("amx_copy_wait<0>")
        self.finish()
