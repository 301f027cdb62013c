"""What the engines of the tile schedule share: coordinates, shared memory, decoding, epilogue."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from amx_tvm.formats.e4m3 import FACTOR

from ..intrinsics.base import at, local
from ..intrinsics.e4m3 import (
    FILL_TABLE,
    TABLE_BYTES,
    decode_bytes,
    entry_words,
    load_entries,
)
from ..intrinsics.finish import Finish, finish
from ..intrinsics.memory import SHARED_ADDRESS, STORE_SHARED
from ..intrinsics.sync import BARRIER, BARRIER_OF, CLUSTER_MEET, CLUSTER_SYNC, UNIFORM
from ..intrinsics.tiles import decode_stage, read_stage, stage_words
from .buffers import Linear
from .tile_plan import TileKnobs


class TileBlock:
    """One block's coordinates, shared memory and epilogue; engines add `run`."""

    def __init__(
        self, linear: Linear, knobs: TileKnobs, extra_bytes: int, lane, warp, n_tile, m_tile, rank
    ):
        shape = linear.decode.shape
        self.linear, self.knobs, self.rank = linear, knobs, rank
        self.threads, self.rows = knobs.groups * 128, knobs.groups * 64
        warp = T.bind(UNIFORM(warp))
        self.lane, self.warp, self.tid = lane, warp, warp * 32 + lane
        self.peer = n_tile % knobs.share  # place among the blocks that share x
        self.n0 = n_tile * self.rows
        self.m0 = m_tile * knobs.block_m if linear.first is None else linear.first
        self.tile = linear.tile(tirx.min(n_tile * (self.rows // 16) + warp, linear.tiles - 1))
        self.units = knobs.columns // shape.unit
        self.warp_codes = self.units * 512
        self.warp_scales = self.units * 8 * shape.record
        total = -(-linear.spec.k // knobs.columns)
        self.iterations = -(-total // knobs.cluster)
        self.first = rank * self.iterations
        self.x_bytes = knobs.block_m * 128
        self._share(extra_bytes + TABLE_BYTES * knobs.e4m3)
        self.table = self.base + self._u32(self.ring_bytes + extra_bytes)
        self.acc = local(knobs.block_m // 2)
        self.coefficients = local(2, "uint32")
        if knobs.e4m3:
            self.entries = local(2 * knobs.parallel * entry_words(linear.decode), "uint32")

    def _share(self, extra_bytes: int) -> None:
        """Lay out shared memory; the 128-byte swizzle wants its base at a multiple of 1024."""
        stages, tiles = self.knobs.stages, self.rows // 16
        codes, scales = tiles * self.warp_codes, tiles * self.warp_scales
        self.ring_bytes = stages * (self.x_bytes + codes + scales)
        tile_bytes = self.knobs.block_m * (self.rows + 4) * 4
        size = max(self.ring_bytes + extra_bytes, tile_bytes) + 1024 + 16
        # a store to the last word, which nothing uses, keeps the size (see intrinsics/base.py); of
        # float32 like gemv's, since C++ wants one type of all kernels' `extern __shared__`
        smem = T.sblock_alloc_buffer((size // 4,), "float32", scope="shared.dyn")
        T.buffer_store(smem, tirx.const(0.0, "float32"), [size // 4 - 1])
        raw = T.bind(SHARED_ADDRESS(at(smem, 0)))
        self.base = T.bind((raw + tirx.const(1023, "uint32")) & tirx.const(0xFFFFFC00, "uint32"))
        self.codes_base = self.base + self._u32(stages * self.x_bytes)
        self.scales_base = self.codes_base + self._u32(stages * codes)

    @staticmethod
    def _u32(value):
        return tirx.const(value, "uint32") if isinstance(value, int) else tirx.Cast("uint32", value)

    def codes_at(self, slot):
        """Shared address of the warp's codes of a slot."""
        return self.codes_base + self._u32((slot * (self.rows // 16) + self.warp) * self.warp_codes)

    def scales_at(self, slot):
        """Shared address of the warp's scales of a slot."""
        return self.scales_base + self._u32(
            (slot * (self.rows // 16) + self.warp) * self.warp_scales
        )

    def x_at(self, slot):
        """Shared address of a slot's rows of x."""
        return self.base + self._u32(slot * self.x_bytes)

    def read_slot(self, words: tirx.Buffer, records: tirx.Buffer, slot, buffer: int) -> None:
        """Read the warp's codes and scales of a slot into one of the register buffers."""
        columns = self.knobs.columns
        sizes = stage_words(self.linear.decode, columns)
        read_stage(self.linear.decode, columns)(
            at(words, sizes[0] * buffer),
            at(records, sizes[1] * buffer),
            self.codes_at(slot),
            self.scales_at(slot),
            self.lane,
        )

    def decode_step(self, a, words: tirx.Buffer, records: tirx.Buffer, buffer: int, step: int):
        """Decode a step of a register buffer into the 4 A registers at an address."""
        sizes = stage_words(self.linear.decode, self.knobs.columns)
        given, record = (a, at(words, sizes[0] * buffer)), at(records, sizes[1] * buffer)
        if self.knobs.e4m3:
            decode_bytes(self.linear.decode)[step](*given, self._entries_at(step))
        else:
            decode_stage(self.linear.decode)[step](*given, record, at(self.coefficients, 0))

    def _entries_at(self, step: int):
        """Place of a step's entries of the table: those of the steps to come lie beside them."""
        ahead = 2 * self.knobs.parallel
        return at(self.entries, step % ahead * entry_words(self.linear.decode))

    def load_entries(self, records: tirx.Buffer, buffer: int, group: int) -> None:
        """Look up what the group-th `parallel` steps of a register buffer decode with."""
        if not self.knobs.e4m3:
            return
        record = stage_words(self.linear.decode, self.knobs.columns)[1] * buffer
        for step in range(group * self.knobs.parallel, (group + 1) * self.knobs.parallel):
            load = load_entries(self.linear.decode)[step]
            load(self._entries_at(step), at(records, record), self.table)

    def fill_table(self) -> None:
        """Bring the table of W's E4M3 numbers to shared memory; all threads, and wait."""
        if self.knobs.e4m3:
            table, threads = at(self.linear.table, 0), self.knobs.warps * 32
            FILL_TABLE(self.table, table, self.tid, threads)
            BARRIER()

    def sync(self) -> None:
        """Wait for all warps that compute."""
        if self.knobs.producer:
            BARRIER_OF[self.threads]()
        else:
            BARRIER()

    def finish(self) -> None:
        """Publish the tile as float32 [row of x][row of W] and write y."""
        stride = self.rows + 4
        self.sync()
        for j in range(self.knobs.block_m // 8):
            for i in range(4):
                row = 8 * j + 2 * (self.lane % 4) + i % 2
                column = self.warp * 16 + self.lane // 4 + 8 * (i // 2)
                place = self.base + self._u32((row * stride + column) * 4)
                STORE_SHARED(place, self.acc[4 * j + i])
        if self.knobs.cluster > 1:
            CLUSTER_SYNC()
        else:
            self.sync()
        shape, corner = (self.knobs.block_m, self.rows), (self.m0, self.n0)
        ranks = (self.rank, self.peer * self.knobs.cluster)
        self.write(shape, self.base, corner, ranks, (self.tid, self.threads))
        if self.knobs.cluster > 1:
            CLUSTER_MEET()  # no block may leave while another reads its tile

    def write(self, shape: tuple, place, corner: tuple, ranks: tuple, thread: tuple) -> None:
        """Sum a finished tile over the cluster, and write y.

        Parameters
        ----------
        shape : tuple
            Rows of x and of W.
        place : tirx.Expr
            Shared address of the tile.
        corner : tuple
            Its first rows of x and of W.
        ranks : tuple
            The block's among those that split K, and the first of these in the cluster.
        thread : tuple
            The thread, and how many work together.
        """
        given = (place, *self.arrays(), self.linear.m, *corner, *ranks, *thread)
        finish(self.what(*shape))(*given, *self.scales_of_e4m3())

    def what(self, block_m: int, rows: int) -> Finish:
        """Say what a finished tile of so many rows of x and of W goes through."""
        linear, knobs = self.linear, self.knobs
        factor = 1.0 if knobs.e4m3 else linear.decode.half_factor
        tile_scale = linear.tile_scale is not None
        return Finish(linear.spec, factor, rows, block_m, knobs.cluster, tile_scale, knobs.e4m3)

    def arrays(self) -> tuple:
        """Places of y, residual, bias and tile scales, of those that there are."""
        linear, zero = self.linear, tirx.const(0, "int32")
        unused = tirx.reinterpret("handle", tirx.const(0, "uint64"))
        return (
            at(linear.y, zero, zero),
            unused if linear.residual is None else at(linear.residual, zero, zero),
            unused if linear.bias is None else at(linear.bias, linear.feature(zero)),
            unused if linear.tile_scale is None else at(linear.tile_scale, linear.tile(zero)),
        )

    def scales_of_e4m3(self) -> tuple:
        """Places of the scales of x and of the one of W, where E4M3 is multiplied."""
        if not self.knobs.e4m3:
            return ()
        return at(self.linear.x_scales, tirx.const(0, "int32")), at(self.linear.table, FACTOR)
