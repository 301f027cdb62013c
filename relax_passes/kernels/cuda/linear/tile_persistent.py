"""Tile schedule on sm_90a for many rows of x: blocks that stay and walk over tiles.

One block a multiprocessor. Its producer requests the stages of all its tiles in one stream, so that
the next tile's stages arrive while this one is written, and there is one prologue a launch. Each
consumer warpgroup writes its own 64 rows of W through a small tile of shared memory of its own,
without waiting for the others:

With E4M3, whose products take half the time, tiles go out as float16 by stmatrix instead
(intrinsics/write.py), and the next stage is read while this one is multiplied.

    for every tile of the block
        for every stage          as in tile_wgmma, but codes and scales have one set of registers:
                                 they are read behind the stage's last product
        for every 32 rows of x   float32 [32][64 + 4] to shared memory, epilogue, y

Tiles are numbered so that those in work at a time share x and W in the L2 cache: bands of 8 blocks
of x, in a band all blocks of x for one block of W, then the next (`share` of W together). Where the
last round has tiles for no more than half of the multiprocessors, two of them take a half each (in
rows of x): 448 tiles are 3.5 rounds of 132 in place of 4.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from amx_tvm.targets.cuda.gpus import Gpu

from ..intrinsics import hopper
from ..intrinsics.base import at, local
from ..intrinsics.memory import STORE_SHARED
from ..intrinsics.sync import (
    BARRIER,
    CLUSTER_MEET,
    GROUP_BARRIER,
    LAUNCH_DEPENDENTS,
    WAIT_PREREQUISITES,
    WARP_SYNC,
)
from ..intrinsics.write import writable, write_tile
from .buffers import Linear
from .tile_plan import TileKnobs
from .tile_wgmma import WgmmaTile

BAND = 8  # blocks of x
CHUNK = 32  # rows of x that a warpgroup writes at a time
_STRIDE = 68  # float32 between rows of x: free of bank conflicts
_SCRATCH = CHUNK * _STRIDE * 4
SCRATCH_BYTES = 2 * _SCRATCH  # of a warpgroup: with two places one barrier a chunk is enough


def _divide(value, by):
    """Quotient as C++ has it; TVM's own // brings cases for negative numbers along."""
    return tirx.truncdiv(value, tirx.const(by, "int32") if isinstance(by, int) else by)


class PersistentTile(WgmmaTile):
    """Emits a block's walk over its tiles."""

    def __init__(
        self, linear: Linear, knobs: TileKnobs, gpu: Gpu, maps: list, block, blocks: int, **place
    ):
        zero = tirx.const(0, "int32")
        self.buffers = 2 if knobs.e4m3 else 1
        super().__init__(linear, knobs, gpu, maps, n_tile=block, m_tile=zero, rank=zero, **place)
        self.slot, self.phase = local(1, "int32"), local(1, "int32")
        self.cluster_index = block // knobs.share
        self.clusters = blocks // knobs.share

    def _share(self, extra_bytes: int) -> None:
        super()._share(extra_bytes + self.knobs.groups * SCRATCH_BYTES)
        end = self.ring_bytes + extra_bytes
        self.scratch = self.base + self._u32(end)

    def _tiles(self, emit) -> None:
        """Emit a loop over the block's tiles, and half a tile behind it (module docstring)."""
        knobs, clusters = self.knobs, self.clusters
        columns = -(-self.linear.tiles * 16 // (self.rows * knobs.share))
        m_tiles = T.bind(_divide(self.linear.m + knobs.block_m - 1, knobs.block_m))
        total = T.bind(m_tiles * columns)
        rest = T.bind(tirx.truncmod(total, tirx.const(clusters, "int32")))
        halve = T.bind(tirx.And(rest > 0, rest * 2 <= clusters))
        whole = T.bind(tirx.Select(halve, total - rest, total))

        def place(index, half: int, rows: int) -> None:
            band = T.bind(_divide(index, BAND * columns))
            in_band = index - band * (BAND * columns)
            height = tirx.min(m_tiles - band * BAND, tirx.const(BAND, "int32"))
            column = T.bind(_divide(in_band, height))
            self.x_rows, self.x_map = rows, self.maps[rows != knobs.block_m]
            m0 = (band * BAND + in_band - column * height) * knobs.block_m
            self.m0 = T.bind(m0 + half * rows)
            self.n0 = T.bind((column * knobs.share + self.peer) * self.rows)
            emit()

        # blocks without a tile have a count of 0: a quotient that is rounded to zero
        count = _divide(whole - self.cluster_index + clusters - 1, clusters)
        with T.serial(count, annotations={"disable_unroll": True}) as i:
            place(T.bind(self.cluster_index + i * clusters), 0, knobs.block_m)
        with T.If(tirx.And(halve, self.cluster_index < rest * 2)):
            with T.Then():
                index = T.bind(whole + _divide(self.cluster_index, 2))
                half = T.bind(tirx.truncmod(self.cluster_index, tirx.const(2, "int32")))
                place(index, half, knobs.block_m // 2)

    def _begin_ring(self) -> None:
        T.buffer_store(self.slot, tirx.const(0, "int32"), [0])
        T.buffer_store(self.phase, tirx.const(0, "int32"), [0])

    def _advance(self) -> None:
        """Go to the next slot of the ring."""
        stages = tirx.const(self.knobs.stages, "int32")
        following = T.bind(self.slot[0] + 1)
        wrap = T.bind(tirx.EQ(following, stages))
        T.buffer_store(self.slot, tirx.Select(wrap, tirx.const(0, "int32"), following), [0])
        T.buffer_store(self.phase, self.phase[0] ^ tirx.Cast("int32", wrap), [0])

    def _produce(self) -> None:
        """Request every stage of every tile; one lane."""
        if self.knobs.dependent:
            WAIT_PREREQUISITES()
        self._begin_ring()

        def tile() -> None:
            with T.serial(self.iterations, annotations={"disable_unroll": True}) as k:
                # the phase before the first counts as over
                slot, phase = self.slot[0], self.phase[0] ^ tirx.const(1, "int32")
                hopper.WAIT_BARRIER(self._empty(slot), self._u32(phase))
                self._copy_weights(k, slot)
                self._copy_x(k, slot)
                self._advance()

        self._tiles(tile)

    def _read(self, buffer: int = 0) -> None:
        """Wait for the stage in the ring's slot and read the warp's codes and scales."""
        slot = self.slot[0]
        hopper.WAIT_BARRIER(self._full(slot), self._u32(self.phase[0]))
        self.read_slot(self.words, self.records, slot, buffer)

    def _stage(self, k, last: bool) -> None:
        """Multiply the stage that is in registers, and read the next one of the tile."""
        knobs = self.knobs
        slot = T.bind(self.slot[0])
        x = T.bind(hopper.WGMMA_OPERAND(self.x_at(slot)))
        before = tirx.Select(slot > 0, slot - 1, tirx.const(knobs.stages - 1, "int32"))
        for step in range(4):
            hopper.WGMMA_WAIT[1]()
            if step == 1:
                # all products of the stage before have ended
                self._hand_back(T.bind(before), k >= 1)
            if step < 3 or not last:
                self.load_entries(self.records, step // 3, (step + 1) % 4)
            a = at(self.a, 4 * (step % 2))
            self.decode_step(a, self.words, self.records, 0, step)
            hopper.wgmma(self.x_rows, knobs.e4m3)[step, 1](at(self.acc, 0), a, x)
            if step == 1 and knobs.e4m3 and not last:
                self._advance()
                self._read(1)
        if knobs.e4m3 and not last:
            for buffer in (self.words, self.records):
                size = int(buffer.shape[0]) // 2
                for i in range(size):
                    T.buffer_store(buffer, buffer[size + i], [i])
            return
        self._advance()
        if not last:
            self._read()

    def _consume_tile(self) -> None:
        """Compute one tile, hand back its last slot, and write y."""
        for i in range(self.x_rows // 2):
            T.buffer_store(self.acc, tirx.const(0.0, "float32"), [i])
        self._read()
        self.load_entries(self.records, 0, 0)
        count = self.iterations
        if count > 1:
            with T.serial(count - 1, annotations={"disable_unroll": True}) as k:
                self._stage(k, last=False)
        slot = T.bind(self.slot[0])
        self._stage(tirx.const(count - 1, "int32"), last=True)
        hopper.WGMMA_WAIT[0]()
        self._hand_back(slot, tirx.const(True, "bool"))
        self._write()

    def _write(self) -> None:
        """Write the warpgroup's part of y, CHUNK rows of x at a time."""
        lane = self.lane
        group, warp = self.warp // 4, self.warp % 4
        if self.knobs.e4m3 and writable(self.linear.spec.out_features):
            acc, scratch = at(self.acc, 0), T.bind(self.scratch + self._u32(group * SCRATCH_BYTES))
            place = (self.linear.m, self.m0, self.n0 + group * 64, group, self.tid % 128)
            write = write_tile(self.what(self.x_rows, 64))
            write(acc, scratch, *self.arrays(), *place, *self.scales_of_e4m3())
            return
        blocks = CHUNK // 8
        for chunk in range(self.x_rows // CHUNK):
            scratch = T.bind(self.scratch + self._u32((2 * group + chunk % 2) * _SCRATCH))
            place = T.bind(
                scratch + self._u32(((lane % 4) * 2 * _STRIDE + warp * 16 + lane // 4) * 4)
            )
            for j in range(blocks):
                for i in range(4):
                    offset = ((8 * j + i % 2) * _STRIDE + 8 * (i // 2)) * 4
                    value = self.acc[4 * (chunk * blocks + j) + i]
                    STORE_SHARED(place + self._u32(offset), value)
            GROUP_BARRIER(group)
            corner = (self.m0 + chunk * CHUNK, self.n0 + group * 64)
            self.write((CHUNK, 64), scratch, corner, (0, 0), (self.tid % 128, 128))

    def run(self) -> None:
        """Emit the whole block."""
        knobs = self.knobs
        if knobs.dependent:
            LAUNCH_DEPENDENTS()

        self._one_lane_of(0, self.make_barriers)
        self.fill_table()
        (BARRIER if knobs.share == 1 else CLUSTER_MEET)()

        def leave() -> None:
            if knobs.share > 1:  # no block may leave while another writes to its memory
                WARP_SYNC()
                CLUSTER_MEET()

        with T.If(self.warp >= self.warps):
            with T.Then():
                self._take_registers(producer=True)
                self._one_lane_of(self.warps, self._produce)
                leave()
            with T.Else():
                self._take_registers(producer=False)
                if knobs.dependent:
                    WAIT_PREREQUISITES()  # before y and the residual
                self._begin_ring()
                self._tiles(self._consume_tile)
                leave()
