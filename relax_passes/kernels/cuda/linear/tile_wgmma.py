"""Tile schedule on sm_90a: the copy engine feeds warpgroups that decode and multiply.

Three bulk tensor copies bring a stage (x in the 128-byte swizzle, codes, scales). A slot has two
mbarriers: `full` counts arrived bytes, `empty` the warps that are done with it, in all blocks that
share x. Either a warp of its own requests the stages (`producer`), or slot s is refilled by a lane
of warp s: sixteen warps with 128 registers a lane fill a multiprocessor, and a seventeenth does not
fit. A warp takes 16 columns of a stage at a time:

    product j - 2 has ended: step j is decoded into its A registers, while product j - 1 runs
    product j starts, a group of its own
    at step 1 all products of stage k - 1 have ended: its slot is handed back; the codes and scales
    of stage k + 1 are read into the other set of registers
    without a producer: behind the last step slot k - 1 is refilled, once all have handed it back

so that decoding one step overlaps with the products of the steps before. Issuing the products of a
whole stage at once does not: a product with A in registers holds its warp until it starts, and all
warps would first wait for the tensor cores and then decode while these idle. (More products in
flight are not to be had: ptxas 13.0 serializes them all once a wait for the barrier, a branch, lies
between a deeper wait and the registers it frees.)

    D[64 rows of W, block_m] += A[64, 16] (registers) * x[block_m, 16]^T (shared memory)

Bounds come from the tensor maps: rows of x beyond M, columns beyond K and tiles beyond N arrive as
zeros.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from amx_tvm.targets.cuda.gpus import Gpu

from ..intrinsics import hopper
from ..intrinsics.base import at, local
from ..intrinsics.sync import BARRIER, CLUSTER_MEET, LAUNCH_DEPENDENTS, WAIT_PREREQUISITES
from ..intrinsics.tiles import stage_words
from .buffers import Linear
from .tile_block import TileBlock
from .tile_plan import TileKnobs

_SWIZZLE_128 = 3
# Registers a lane shall keep to, by rows of x in a block: half a row's sum and 50 more, as whole
# blocks share a multiprocessor's.
_REGISTERS = {8: 80, 16: 80, 32: 80, 64: 80, 128: 128, 256: 255}


def _tensor_map(dtype: str, data, shape: list, strides: list, box: list, swizzle: int):
    """Encode a tensor map on the host, innermost dimension first; a kernel parameter by value."""
    tensor_map = T.bind(T.tvm_stack_alloca("tensormap", 1), T.handle("tensormap"))
    arguments = [*shape, *strides, *box, *([1] * len(shape)), 0, swizzle, 0, 0]
    encode = "runtime.cuTensorMapEncodeTiled"
    T.evaluate(T.call_packed(encode, tensor_map, dtype, len(shape), data, *arguments))
    return tensor_map


def tensor_maps(linear: Linear, knobs: TileKnobs) -> list:
    """Maps of x [m][K], codes [tile][unit][128 words] and scales [tile][unit][words].

    x is float16, or bytes of E4M3.

    Persistent blocks have two of x: for `block_m` rows at a time and for half of them.
    """
    shape, k = linear.decode.shape, linear.spec.k
    units, tiles = linear.units, linear.tiles * max(1, linear.spec.experts)
    per_stage, warps = knobs.columns // shape.unit, knobs.groups * 4
    x, dtype = (linear.x_codes, "uint8") if knobs.e4m3 else (linear.x, "float16")
    stride = k if knobs.e4m3 else 2 * k
    blocks = [knobs.block_m] + [knobs.block_m // 2] * knobs.persistent
    assert x is not None, "E4M3 without x in E4M3"  # tile.emit refuses it
    maps = []
    for rows in blocks:
        box = [knobs.columns, rows // knobs.share]
        maps.append(_tensor_map(dtype, x.data, [k, linear.m], [stride], box, _SWIZZLE_128))
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

    buffers = 2  # sets of registers for codes and scales

    def __init__(self, linear: Linear, knobs: TileKnobs, gpu: Gpu, maps: list, **place):
        super().__init__(linear, knobs, extra_bytes=16 * knobs.stages, **place)
        self.maps, self.gpu = maps, gpu
        weights = maps[1 + knobs.persistent :]
        self.codes_map, self.scales_map = weights[0], weights[-1]
        self.x_map, self.x_rows = maps[0], knobs.block_m
        self.warps = knobs.groups * 4
        self.barriers = self.base + self._u32(self.ring_bytes)
        words, records = stage_words(linear.decode, knobs.columns)
        self.words = local(self.buffers * words, "uint32")
        self.records = local(self.buffers * records, "uint32")
        self.a = local(8 * knobs.parallel, "uint32")
        self.parity = local(1, "int32")

    def _full(self, slot):
        return self.barriers + self._u32(slot * 8)

    def _empty(self, slot):
        return self.barriers + self._u32((self.knobs.stages + slot) * 8)

    def _copy_weights(self, k, slot) -> None:
        """Announce a stage's bytes and request its codes and scales."""
        bytes_of_stage = self.x_rows * 128 + self.warps * (self.warp_codes + self.warp_scales)
        unit, tile = (self.first + k) * self.units, self.linear.tile(self.n0 // 16)
        full, zero = self._full(slot), tirx.const(0, "int32")
        hopper.EXPECT(full, self._u32(bytes_of_stage))
        codes = self.codes_base + self._u32(slot * (self.warps * self.warp_codes))
        hopper.TMA[3](codes, T.address_of(self.codes_map), zero, unit, tile, full)
        if self.warp_scales:
            scales = self.scales_base + self._u32(slot * (self.warps * self.warp_scales))
            hopper.TMA[3](scales, T.address_of(self.scales_map), zero, unit, tile, full)

    def _copy_x(self, k, slot) -> None:
        """Request the block's part of a stage of x for all blocks that share it."""
        column, share = (self.first + k) * self.knobs.columns, self.knobs.share
        x, full = T.address_of(self.x_map), self._full(slot)
        if share == 1:
            hopper.TMA[2](self.x_at(slot), x, column, self.m0, full)
            return
        rows = self.x_rows // share
        place = self.x_at(slot) + self._u32(self.peer * (rows * 128))
        sharing = sum(1 << self.knobs.cluster * i for i in range(share))
        mask = tirx.shift_left(tirx.const(sharing, "int32"), self.rank)
        hopper.TMA_2D_SHARED(place, x, column, self.m0 + self.peer * rows, full, mask)

    def make_barriers(self) -> None:
        """Make the ring's barriers; one lane, and the block waits behind it."""
        for tensor_map in self.maps:
            hopper.TMA_PREFETCH(T.address_of(tensor_map))
        readers = self.warps * self.knobs.share
        for slot in range(self.knobs.stages):
            hopper.INIT_BARRIER(self._full(slot), self._u32(1))
            hopper.INIT_BARRIER(self._empty(slot), self._u32(readers))
        hopper.INIT_DONE()

    def fill_weights(self) -> None:
        """Request W of the first stages; one lane. W depends on no other kernel."""
        for k in range(min(self.knobs.stages, self.iterations)):
            self._copy_weights(tirx.const(k, "int32"), k)

    def fill_x(self) -> None:
        """Request x of the first stages; one lane."""
        if self.knobs.dependent:
            WAIT_PREREQUISITES()
        for k in range(min(self.knobs.stages, self.iterations)):
            self._copy_x(tirx.const(k, "int32"), k)

    def _one_lane_of(self, warp: int, emit) -> None:
        """Emit work for one lane of a warp; elected, so that ptxas knows that it is one."""
        with T.If(tirx.EQ(self.warp, warp)):
            with T.Then():
                with T.If(hopper.ELECT()):
                    with T.Then():
                        emit()

    def _refill(self, k, slot, round_of) -> None:
        """Request stage k + stages into the slot of stage k, once all warps are done with that."""
        hopper.WAIT_BARRIER(self._empty(slot), self._u32(round_of % 2))
        self._copy_weights(k + self.knobs.stages, slot)
        self._copy_x(k + self.knobs.stages, slot)

    def _keep_full(self) -> None:
        """Refill slots as they fall free, all of K; one lane of the producer."""
        stages = self.knobs.stages
        if self.iterations > stages:
            with T.serial(self.iterations - stages, annotations={"disable_unroll": True}) as k:
                self._refill(k, k % stages, k // stages)

    def _read_stage(self, slot: int, buffer: int) -> None:
        """Wait for a stage and read the warp's codes and scales; its slot's next round differs."""
        hopper.WAIT_BARRIER(self._full(slot), self._u32(self.parity[0]))
        if slot == self.knobs.stages - 1:
            T.buffer_store(self.parity, self.parity[0] ^ tirx.const(1, "int32"), [0])
        self.read_slot(self.words, self.records, tirx.const(slot, "int32"), buffer)

    def _hand_back(self, slot: int, wanted) -> None:
        """Tell the producers that fill a slot that this warp is done with it."""
        knobs, empty = self.knobs, self._empty(slot)
        if knobs.share == 1:
            hopper.ARRIVE_LANE0(empty, wanted, self.lane)
        else:
            arrive = hopper.ARRIVE_PEERS[knobs.share, knobs.cluster]
            arrive(empty, self.rank, wanted, self.lane)

    def _consume_stage(self, k, slot: int, last: bool = False) -> None:
        """Multiply stage k, hand back the slot before, read the next stage.

        A slot is handed back only where a later stage goes there: at the end the barriers may be
        overwritten.
        """
        knobs, parallel = self.knobs, self.knobs.parallel
        buffer = slot % 2
        x = T.bind(hopper.WGMMA_OPERAND(self.x_at(slot)))
        before = (slot - 1) % knobs.stages
        back = tirx.And(k >= 1, k + knobs.stages <= self.iterations)
        for group in range(4 // parallel):
            first = 4 * parallel * (group % 2)
            hopper.WGMMA_WAIT[1]()
            if group == 1:
                self._hand_back(before, back)
            following = group + 1 < 4 // parallel
            if following or not last:
                ahead = (buffer, group + 1) if following else (1 - buffer, 0)
                self.load_entries(self.records, *ahead)
            for i in range(parallel):
                a = at(self.a, first + 4 * i)
                self.decode_step(a, self.words, self.records, buffer, group * parallel + i)
            multiply = hopper.wgmma(knobs.block_m, knobs.e4m3)[group * parallel, parallel]
            multiply(at(self.acc, 0), at(self.a, first), x)
            if group == 1 and not last:
                self._read_stage((slot + 1) % knobs.stages, 1 - buffer)
        if not knobs.producer:
            with T.If(back):
                with T.Then():
                    round_of = (k - 1) // knobs.stages
                    owner = before % self.warps
                    self._one_lane_of(owner, lambda: self._refill(k - 1, before, round_of))

    def consume(self) -> None:
        """Walk K (module docstring), a round of the ring unrolled."""
        stages, count = self.knobs.stages, self.iterations
        for i in range(self.knobs.block_m // 2):
            T.buffer_store(self.acc, tirx.const(0.0, "float32"), [i])
        T.buffer_store(self.parity, tirx.const(0, "int32"), [0])
        self._read_stage(0, 0)
        self.load_entries(self.records, 0, 0)
        whole = (count - 1) // stages * stages  # the last stage is not among them
        if whole:
            with T.serial(whole // stages, annotations={"disable_unroll": True}) as i:
                for slot in range(stages):
                    self._consume_stage(i * stages + slot, slot)
        for k in range(whole, count):
            self._consume_stage(tirx.const(k, "int32"), k - whole, last=k == count - 1)
        hopper.WGMMA_WAIT[0]()

    @property
    def blocks(self) -> int:
        """Blocks that shall fit a multiprocessor together."""
        if self.knobs.producer:
            return 1
        registers = _REGISTERS[self.knobs.block_m] * self.knobs.warps * 32
        return max(1, self.gpu.registers // registers)

    def _take_registers(self, producer: bool) -> None:
        """Move registers from the producer to the consumers."""
        if not self.knobs.cedes:
            return
        fewer, more = self.knobs.registers(self.gpu)
        if producer:
            hopper.FEWER_REGISTERS[fewer]()
        else:
            hopper.MORE_REGISTERS[more]()

    def run(self) -> None:
        """Emit the whole block."""
        knobs = self.knobs
        if knobs.dependent:
            LAUNCH_DEPENDENTS()

        def begin() -> None:
            self.make_barriers()
            self.fill_weights()

        self._one_lane_of(0, begin)
        self.fill_table()
        # blocks that share x write to each other's memory
        (BARRIER if knobs.share == 1 else CLUSTER_MEET)()
        if not knobs.producer:
            self._one_lane_of(0, self.fill_x)
            self._consume_and_finish()
            return

        def produce() -> None:
            self.fill_x()
            self._keep_full()

        # The roles never meet again: registers that moved from one to the other stay there.
        with T.If(self.warp >= self.warps):
            with T.Then():
                self._take_registers(producer=True)
                self._one_lane_of(self.warps, produce)
            with T.Else():
                self._take_registers(producer=False)
                self._consume_and_finish()

    def _consume_and_finish(self) -> None:
        self.consume()
        if self.knobs.dependent:
            WAIT_PREREQUISITES()  # before the residual is read
        self.finish()
