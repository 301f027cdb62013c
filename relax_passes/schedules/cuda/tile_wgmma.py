"""Tile schedule on sm_90a: the copy engine feeds warpgroups that decode and multiply.

One thread, of a producer warp of its own or of the first warp, issues three bulk tensor copies a
stage (x in the 128-byte swizzle, codes, scales). A slot has two mbarriers: `full` counts arrived
bytes, `empty` the warps that are done with it. Iteration k of a consuming warp, so that the tensor
cores never wait for a decode:

    product k starts (A registers of set k % 2, x of slot k % stages)
    stage k + 1 has arrived: its codes and scales are read
    product k - 1 ends: its slot is handed back, its A registers are free
    without a producer: the slot of stage k - 2, which all have handed back by now, is refilled
    stage k + 1 is decoded into them, while product k runs

    D[64 rows of W, block_m] += A[64, 16] (registers) * x[block_m, 16]^T (shared memory)

Bounds come from the tensor maps: rows of x beyond M, columns beyond K and tiles beyond N arrive as
zeros.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from .buffers import Linear
from .intrinsics import at, local
from .tile import STAGE_COLUMNS, TileBlock, TileKnobs

_SWIZZLE_128 = 3


def _tensor_map(dtype: str, data, shape: list, strides: list, box: list, swizzle: int):
    """Encode a tensor map on the host, innermost dimension first; a kernel parameter by value."""
    tensor_map = T.bind(T.tvm_stack_alloca("tensormap", 1), T.handle("tensormap"))
    arguments = [*shape, *strides, *box, *([1] * len(shape)), 0, swizzle, 0, 0]
    encode = "runtime.cuTensorMapEncodeTiled"
    T.evaluate(T.call_packed(encode, tensor_map, dtype, len(shape), data, *arguments))
    return tensor_map


def tensor_maps(linear: Linear, knobs: TileKnobs) -> list:
    """Maps of x [m][K], codes [tile][unit][128 words] and scales [tile][unit][words]."""
    shape, k = linear.decode.shape, linear.spec.k
    units, tiles = linear.units, linear.tiles
    per_stage, warps = STAGE_COLUMNS // shape.unit, knobs.groups * 4
    box_x = [STAGE_COLUMNS, knobs.block_m]
    maps = [_tensor_map("float16", linear.x.data, [k, linear.m], [2 * k], box_x, _SWIZZLE_128)]
    sources = [(linear.codes, 512)]
    if linear.scales is not None:
        sources.append((linear.scales, 8 * shape.record))
    for buffer, size in sources:
        words = size // 4
        extents, strides = [words, units, tiles], [size, size * units]
        box = [words, per_stage, warps]
        maps.append(_tensor_map("int32", buffer.data, extents, strides, box, 0))
    return maps


class WgmmaTile(TileBlock):
    """Emits one block's work with wgmma and the copy engine."""

    def __init__(self, linear: Linear, knobs: TileKnobs, maps: list, **place):
        super().__init__(linear, knobs, extra_bytes=16 * knobs.stages, **place)
        self.maps = maps
        self.warps = knobs.groups * 4
        self.barriers = self.base + self._u32(self.ring_bytes)
        self.a = local(32, "uint32")
        self.slots = local(6, "int32")
        self.count = local(1, "int32")

    def _full(self, slot):
        return self.barriers + self._u32(slot * 8)

    def _empty(self, slot):
        return self.barriers + self._u32((self.knobs.stages + slot) * 8)

    def _stage_bytes(self) -> int:
        return self.x_bytes + self.warps * (self.warp_codes + self.warp_scales)

    def _copy_weights(self, k, slot) -> None:
        unit, tile = (self.first + k) * self.units, self.n0 // 16
        full = self._full(slot)
        zero = tirx.const(0, "int32")
        codes = self.codes_base + self._u32(slot * (self.warps * self.warp_codes))
        self.do("amx_tma_3d", codes, T.address_of(self.maps[1]), zero, unit, tile, full)
        if self.warp_scales:
            scales = self.scales_base + self._u32(slot * (self.warps * self.warp_scales))
            self.do("amx_tma_3d", scales, T.address_of(self.maps[2]), zero, unit, tile, full)

    def _copy_x(self, k, slot) -> None:
        column = (self.first + k) * STAGE_COLUMNS
        x = T.address_of(self.maps[0])
        self.do("amx_tma_2d", self.x_at(slot), x, column, self.m0, self._full(slot))

    def fill(self) -> None:
        """Request the first stages; one thread. Weights first: they depend on no other kernel."""
        ahead = min(self.knobs.stages, self.iterations)
        for k in range(ahead):
            self.do("amx_expect", self._full(k), self._u32(self._stage_bytes()))
            self._copy_weights(tirx.const(k, "int32"), k)
        if self.knobs.dependent:
            self.do("amx_wait_prerequisites")
        for k in range(ahead):
            self._copy_x(tirx.const(k, "int32"), k)

    def _refill(self) -> None:
        """Request a new stage into the slot of stage k - 2, once all warps are done with that."""
        stages = self.knobs.stages
        if self.iterations <= stages:
            return
        k, slot, parity = self.count[0] - 2, self.slots[0], self.slots[4]
        wanted = tirx.And(tirx.EQ(self.tid, 0), tirx.And(k >= 0, k + stages < self.iterations))
        with T.If(wanted):
            with T.Then():
                self.do("amx_wait_barrier", self._empty(slot), self._u32(parity))
                self.do("amx_expect", self._full(slot), self._u32(self._stage_bytes()))
                self._copy_weights(k + stages, slot)
                self._copy_x(k + stages, slot)

    def _keep_full(self) -> None:
        """Request every later stage as its slot falls free; one lane of the producer warp."""
        stages = self.knobs.stages
        if self.iterations <= stages:
            return
        with T.serial(self.iterations - stages, annotations={"disable_unroll": True}) as k:
            slot = k % stages
            self.do("amx_wait_barrier", self._empty(slot), self._u32(k // stages % 2))
            self.do("amx_expect", self._full(slot), self._u32(self._stage_bytes()))
            self._copy_weights(k + stages, slot)
            self._copy_x(k + stages, slot)

    def _advance(self) -> None:
        """Shift the window of slots: index 0..3 are stages k - 2 .. k + 1, 4 and 5 the parities of
        the rounds of stages k - 2 and k + 1. Counting beats dividing k by the number of stages.
        """
        stages, slots = self.knobs.stages, self.slots
        for i in range(3):
            T.buffer_store(slots, slots[i + 1], [i])
        wraps = tirx.EQ(slots[3], stages - 1)
        one = tirx.const(1, "int32")
        T.buffer_store(slots, slots[5] ^ tirx.Select(wraps, one, one - 1), [5])
        T.buffer_store(slots, tirx.Select(wraps, one - 1, slots[3] + 1), [3])
        begins = tirx.And(tirx.EQ(slots[0], 0), self.count[0] >= stages + 1)
        T.buffer_store(slots, slots[4] ^ tirx.Select(begins, one, one - 1), [4])
        T.buffer_store(self.count, self.count[0] + 1, [0])

    def consume(self) -> None:
        """Walk K (module docstring)."""
        stages, bm = self.knobs.stages, self.knobs.block_m
        for i in range(bm // 2):
            T.buffer_store(self.acc, tirx.const(0.0, "float32"), [i])
        # k = 0: stages -2, -1, 0, 1
        for i, value in enumerate((stages - 2, stages - 1, 0, 1 % stages, 0, 0)):
            T.buffer_store(self.slots, tirx.const(value, "int32"), [i])
        T.buffer_store(self.count, tirx.const(0, "int32"), [0])
        self.do("amx_wait_barrier", self._full(0), self._u32(0))
        self.decode_slot(self.a, tirx.const(0, "int32"), 0)
        with T.serial(self.iterations // 2, annotations={"disable_unroll": True}) as pair:
            for odd in range(2):
                xs = self.x_at(self.slots[2])
                self.do(f"amx_tile_wgmma_{bm}", at(self.acc, 0), at(self.a, 16 * odd), xs)
                if not odd:
                    self._next(odd)
                else:
                    with T.If(pair < self.iterations // 2 - 1):
                        with T.Then():
                            self._next(odd)
        self.do("amx_wgmma_wait<0>")

    def _next(self, odd: int) -> None:
        """Finish product k - 1, decode stage k + 1, step k."""
        slots = self.slots
        self.do("amx_wait_barrier", self._full(slots[3]), self._u32(slots[5]))
        self.do("amx_wgmma_wait<1>")
        if odd:
            self.do("amx_arrive_lane0", self._empty(slots[1]), self.lane)
        else:
            with T.If(self.count[0] > 0):
                with T.Then():
                    self.do("amx_arrive_lane0", self._empty(slots[1]), self.lane)
        if not self.knobs.producer:
            self._refill()
        self.decode_slot(self.a, slots[3], 1 - odd)
        self._advance()

    def run(self) -> None:
        """Emit the whole block."""
        if self.knobs.dependent:
            self.do("amx_launch_dependents")
        with T.If(tirx.EQ(self.tid, 0)):
            with T.Then():
                for tensor_map in self.maps:
                    self.do("amx_tma_prefetch", T.address_of(tensor_map))
                for slot in range(self.knobs.stages):
                    self.do("amx_init_barrier", self._full(slot), self._u32(1))
                    self.do("amx_init_barrier", self._empty(slot), self._u32(self.warps))
                self.do("amx_init_done")
        self.do("amx_barrier")
        if not self.knobs.producer:
            with T.If(tirx.EQ(self.tid, 0)):
                with T.Then():
                    self.fill()
            self._consume_and_finish()
            return
        # The roles never meet again: registers that moved from one to the other stay there.
        with T.If(self.warp >= self.warps):
            with T.Then():
                if self.knobs.cedes:
                    self.do("amx_wgmma_fewer_registers<40>")
                with T.If(tirx.EQ(self.tid, self.warps * 32)):
                    with T.Then():
                        self.fill()
                        self._keep_full()
            with T.Else():
                if self.knobs.cedes:
                    self.do("amx_wgmma_more_registers<232>")
                self._consume_and_finish()

    def _consume_and_finish(self) -> None:
        self.consume()
        if self.knobs.dependent:
            self.do("amx_wait_prerequisites")  # before the residual is read
        self.finish()
