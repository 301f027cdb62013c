"""Schedule for M > 8: W decoded and scaled in registers, x shared through shared memory.

A block computes 64 or 128 rows of W by `block_m` rows of x. Each warp owns 16 rows of W (one tile of the
packed layout) in all columns; K runs in stages of 64 columns through a ring of shared memory that
cp.async fills with x (swizzled, see tile_text), codes and scales. Two engines share everything else:

    wgmma   sm_90a. D[64 rows of W, block_m] += A (registers) * x (shared memory), asynchronous:
            while the product of stage k runs, the warps decode stage k + 1 into the other set of A
            registers; the product before it is waited for only then, so the queue never runs dry
    mma     every GPU from sm_80 on: mma.sync with ldmatrix

Small M: a cluster of blocks splits K and sums its float32 tiles through distributed shared memory
(sm_90 and later), so that 32 row tiles still fill 132 multiprocessors. Ring, for S stages:

    iteration k:  stages <= k + 1 have arrived | product k starts | copy of stage k + S - 2 starts
                  (its slot was stage k - 2's, whose product is done) | product k - 1 ends | decode k + 1
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from .buffers import Linear
from .intrinsics import at, call, local
from .tile_text import tile_texts

STAGE_COLUMNS = 64


@dataclass(frozen=True)
class TileKnobs:
    """Free choices of the schedule.

    block_m : rows of x in a block: 16, 32, 64, 128 or 256
    groups : groups of four warps (64 rows of W each) in a block
    stages : slots of the ring, at least 4
    cluster : blocks that split K (sm_90 and later)
    wgmma : take the asynchronous tensor core instruction (sm_90a)
    dependent : programmatic dependent launch (sm_90 and later)
    """

    block_m: int = 64
    groups: int = 2
    stages: int = 4
    cluster: int = 1
    wgmma: bool = True
    dependent: bool = False


class _Tile:
    """Emits one block's work."""

    def __init__(self, linear: Linear, knobs: TileKnobs, tx, ty, n_tile, m_tile, rank):
        shape = linear.decode.shape
        self.linear, self.knobs, self.rank = linear, knobs, rank
        self.threads, self.rows = knobs.groups * 128, knobs.groups * 64
        self.finish_name, self.texts = tile_texts(linear, knobs.block_m, knobs.cluster, self.rows)
        self.lane, self.warp, self.tid = tx, ty, ty * 32 + tx
        self.m0, self.n0 = m_tile * knobs.block_m, n_tile * self.rows
        self.tile = tirx.min(n_tile * (self.rows // 16) + ty, linear.tiles - 1)
        self.units = STAGE_COLUMNS // shape.unit
        self.warp_codes = self.units * 512
        self.warp_scales = self.units * 8 * shape.record
        total = -(-linear.spec.k // STAGE_COLUMNS)
        self.iterations = -(-total // knobs.cluster)
        self.iterations += self.iterations % 2  # A registers alternate: an even number of stages
        self.first = rank * self.iterations
        self.x_bytes = knobs.block_m * 128
        warps = knobs.groups * 4
        ring = knobs.stages * (self.x_bytes + warps * (self.warp_codes + self.warp_scales))
        tile_bytes = knobs.block_m * (self.rows + 4) * 4
        self.shared_bytes = max(ring, tile_bytes) + 1024 + 16
        # padded so that TVM keeps the size (see intrinsics.local); the byte itself is never used
        smem = T.sblock_alloc_buffer((self.shared_bytes,), "uint8", scope="shared.dyn")
        T.buffer_store(smem, tirx.const(0, "uint8"), [self.shared_bytes - 1])
        raw = T.bind(self._value("amx_smem", "uint32", at(smem, 0)))
        self.base = T.bind((raw + tirx.const(1023, "uint32")) & tirx.const(0xFFFFFC00, "uint32"))
        self.codes_base = self.base + self._u32(knobs.stages * self.x_bytes)
        scales = knobs.stages * (self.x_bytes + warps * self.warp_codes)
        self.scales_base = self.base + self._u32(scales)
        self.acc = local(knobs.block_m // 2)
        self.a = local(32 if knobs.wgmma else 16, "uint32")

    @staticmethod
    def _u32(value):
        return tirx.const(value, "uint32") if isinstance(value, int) else tirx.Cast("uint32", value)

    def _value(self, name: str, dtype: str, *args):
        return call(name, *args, returns=dtype, text=self._text(name))

    def _do(self, name: str, *args) -> None:
        call(name, *args, text=self._text(name))

    def _text(self, name: str) -> str:
        return next(text for start, text in self.texts.items() if name.startswith(start))

    def _codes_at(self, slot):
        warps = self.knobs.groups * 4
        return self.codes_base + self._u32((slot * warps + self.warp) * self.warp_codes)

    def _scales_at(self, slot):
        warps = self.knobs.groups * 4
        return self.scales_base + self._u32((slot * warps + self.warp) * self.warp_scales)

    def _x_at(self, slot):
        return self.base + self._u32(slot * self.x_bytes)

    def copy_w(self, k, slot) -> None:
        """Request a warp's codes and scales of local stage k."""
        linear = self.linear
        zero = tirx.const(0, "int32")
        scales = linear.codes if linear.scales is None else linear.scales
        self._do(
            f"amx_copy_w<{self.units}, {self.warp_scales}>",
            self._codes_at(slot),
            self._scales_at(slot),
            at(linear.codes, self.tile, zero, zero),
            at(scales, self.tile, zero, zero),
            (self.first + k) * self.units,
            tirx.const(linear.units - 1, "int32"),
            self.lane,
        )

    def copy_x(self, k, slot) -> None:
        """Request the block's rows of x of local stage k, and close the stage's group."""
        linear = self.linear
        zero = tirx.const(0, "int32")
        self._do(
            f"amx_copy_x<{self.knobs.block_m}, {self.threads}, {linear.spec.k}>",
            self._x_at(slot),
            at(linear.x, zero, zero),
            linear.m,
            self.m0,
            (self.first + k) * STAGE_COLUMNS,
            self.tid,
        )
        self._do("amx_copy_commit")

    def copy(self, k) -> None:
        """Request local stage k, or close an empty group beyond the last."""
        slot = k % self.knobs.stages
        with T.If(k < self.iterations):
            with T.Then():
                self.copy_w(k, slot)
                self.copy_x(k, slot)
            with T.Else():
                self._do("amx_copy_commit")

    def decode(self, k, buffer: int) -> None:
        """Decode a warp's stage into a set of A registers."""
        slot = k % self.knobs.stages
        name = f"amx_stage_{self.linear.decode.ident}"
        self._do(name, at(self.a, 16 * buffer), self._codes_at(slot), self._scales_at(slot), self.lane)

    def prologue(self, ahead: int) -> None:
        """Fill `ahead` slots; weights first, x after the kernel before has finished."""
        ahead = min(ahead, self.iterations) if not self.knobs.wgmma else ahead
        if self.knobs.dependent:
            self._do("amx_launch_dependents")
        for k in range(ahead):
            if k < self.iterations:
                self.copy_w(k, k % self.knobs.stages)
        if self.knobs.dependent:
            self._do("amx_wait_prerequisites")
        for k in range(ahead):
            if k < self.iterations:
                self.copy_x(k, k % self.knobs.stages)
            else:
                self._do("amx_copy_commit")
        for i in range(self.knobs.block_m // 2):
            T.buffer_store(self.acc, tirx.const(0.0, "float32"), [i])

    def run_wgmma(self) -> None:
        """Walk K with the asynchronous engine (module docstring)."""
        stages, bm = self.knobs.stages, self.knobs.block_m
        self.prologue(stages - 2)
        self._do(f"amx_copy_wait<{stages - 3}>")
        self._do("amx_barrier")
        self.decode(0, 0)
        with T.serial(self.iterations // 2, annotations={"disable_unroll": True}) as pair:
            for odd in range(2):
                k = pair * 2 + odd
                self._do(f"amx_copy_wait<{stages - 4}>")
                self._do("amx_barrier")
                xs = self._x_at(k % stages)
                self._do(f"amx_tile_wgmma_{bm}", at(self.acc, 0), at(self.a, 16 * odd), xs)
                self.copy(k + stages - 2)
                self._do("amx_wgmma_wait<1>")
                self.decode(k + 1, 1 - odd)  # beyond the last stage: stale bytes, never multiplied
        self._do("amx_wgmma_wait<0>")

    def run_mma(self) -> None:
        """Walk K with mma.sync."""
        stages = self.knobs.stages
        self.prologue(stages - 1)
        with T.serial(self.iterations, annotations={"disable_unroll": True}) as k:
            self._do(f"amx_copy_wait<{stages - 2}>")
            self._do("amx_barrier")
            self.copy(k + stages - 1)
            self.decode(k, 0)
            xs = self._x_at(k % stages)
            name = f"amx_tile_mma<{self.knobs.block_m}>"
            self._do(name, at(self.acc, 0), at(self.a, 0), xs, self.lane)

    def finish(self) -> None:
        """Publish the tile as float32 [row of x][row of W] and write y."""
        linear, stride = self.linear, self.rows + 4
        self._do("amx_copy_wait<0>")
        self._do("amx_barrier")
        for j in range(self.knobs.block_m // 8):
            for i in range(4):
                row = 8 * j + 2 * (self.lane % 4) + i % 2
                column = self.warp * 16 + self.lane // 4 + 8 * (i // 2)
                place = self.base + self._u32((row * stride + column) * 4)
                self._do("amx_sts1", place, self.acc[4 * j + i])
        self._do("amx_cluster_sync" if self.knobs.cluster > 1 else "amx_barrier")
        zero = tirx.const(0, "int32")
        unused = tirx.reinterpret("handle", tirx.const(0, "uint64"))
        self._do(
            self.finish_name,
            self.base,
            at(linear.y, zero, zero),
            unused if linear.residual is None else at(linear.residual, zero, zero),
            unused if linear.bias is None else at(linear.bias, zero),
            unused if linear.row_scale is None else at(linear.row_scale, zero),
            linear.m,
            self.m0,
            self.n0,
            self.rank,
            self.tid,
            tirx.const(self.threads, "int32"),
        )
        if self.knobs.cluster > 1:
            self._do("amx_cluster_sync")  # no block may leave while another reads its tile


def emit(linear: Linear, knobs: TileKnobs) -> None:
    """Emit the kernel; any number of rows of x, in blocks of `block_m`."""
    rows = knobs.groups * 64
    n_tiles = -(-linear.tiles * 16 // rows)
    m_tiles = (linear.m + knobs.block_m - 1) // knobs.block_m

    def body(bx, by, ty, tx) -> None:
        with T.sblock("linear"):
            T.reads()
            T.writes()
            zero = tirx.const(0, "int32")
            split = knobs.cluster > 1
            tile = _Tile(linear, knobs, tx, ty, by, zero if split else bx, bx if split else zero)
            (tile.run_wgmma if knobs.wgmma else tile.run_mma)()
            tile.finish()

    threads = [
        T.thread_binding(n_tiles, thread="blockIdx.y"),
        T.thread_binding(m_tiles if knobs.cluster == 1 else knobs.cluster, thread="blockIdx.x"),
        T.thread_binding(knobs.groups * 4, thread="threadIdx.y"),
        T.thread_binding(32, thread="threadIdx.x"),
    ]
    if knobs.cluster > 1:
        # becomes a launch attribute; blockIdx.x is the rank in the cluster
        threads.insert(2, T.thread_binding(knobs.cluster, thread="clusterCtaIdx.x"))
    with T.frame_scope(threads) as bound:
        body(bound[1], bound[0], bound[-2], bound[-1])
