"""Schedule for M > 8: W decoded and scaled in registers, x shared through shared memory.

A block computes `groups` * 64 rows of W by `block_m` rows of x. Each warp owns 16 rows of W (one
tile of the packed layout) in all columns; K runs in stages of 64 columns through a ring in shared
memory:

    x       [stages][block_m][64 columns], 128-byte rows, swizzled (see tile_text)
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

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from .buffers import Linear
from .intrinsics import at, call, local
from .tile_text import stage_words, tile_texts

STAGE_COLUMNS = 64


@dataclass(frozen=True)
class TileKnobs:
    """Free choices of the schedule.

    block_m : rows of x in a block: 8, 16, 32, 64, 128 or 256
    groups : groups of four warps (64 rows of W each) in a block
    stages : slots of the ring; with wgmma an even number
    cluster : blocks that split K (sm_90 and later)
    share : blocks that request x together (wgmma); divides block_m / 8
    parallel : steps of 16 columns that are decoded and multiplied together (wgmma): 1 or 2
    producer : a warp of its own requests the stages (wgmma). With 256 rows of x it is a warpgroup
        that cedes its registers to the others
    persistent : one block a multiprocessor walks over tiles (tile_persistent; wgmma with a
        producer, cluster 1); any number of stages
    wgmma : take the asynchronous tensor core instruction and the copy engine (sm_90a)
    dependent : programmatic dependent launch (sm_90 and later)
    """

    block_m: int = 64
    groups: int = 2
    stages: int = 4
    cluster: int = 1
    share: int = 1
    parallel: int = 1
    producer: bool = False
    persistent: bool = False
    wgmma: bool = True
    dependent: bool = False

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.groups * 4 + (0 if not self.producer else 4 if self.cedes else 1)

    @property
    def cedes(self) -> bool:
        """Whether registers move from the producer to the consumers."""
        return self.producer and self.block_m == 256

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a producer's and of a consumer's lane where they move."""
        fewer, lanes = 40, self.warps * 32
        at_launch = 65536 // lanes // 8 * 8
        left = (at_launch * lanes - fewer * 128) // (self.groups * 128) // 8 * 8
        return fewer, min(left, 232)


class TileBlock:
    """One block's coordinates, shared memory and epilogue; engines add `run`."""

    def __init__(
        self, linear: Linear, knobs: TileKnobs, extra_bytes: int, lane, warp, n_tile, m_tile, rank
    ):
        shape = linear.decode.shape
        self.linear, self.knobs, self.rank = linear, knobs, rank
        self.threads, self.rows = knobs.groups * 128, knobs.groups * 64
        self.finish_name, self.texts = tile_texts(linear, knobs.block_m, knobs.cluster, self.rows)
        warp = T.bind(call("amx_uniform", warp, returns="int32"))
        self.lane, self.warp, self.tid = lane, warp, warp * 32 + lane
        self.peer = n_tile % knobs.share  # place among the blocks that share x
        self.m0, self.n0 = m_tile * knobs.block_m, n_tile * self.rows
        self.tile = tirx.min(n_tile * (self.rows // 16) + warp, linear.tiles - 1)
        self.units = STAGE_COLUMNS // shape.unit
        self.warp_codes = self.units * 512
        self.warp_scales = self.units * 8 * shape.record
        total = -(-linear.spec.k // STAGE_COLUMNS)
        self.iterations = -(-total // knobs.cluster)
        self.first = rank * self.iterations
        self.x_bytes = knobs.block_m * 128
        self._share(extra_bytes)
        self.acc = local(knobs.block_m // 2)
        self.coefficients = local(2, "uint32")

    def _share(self, extra_bytes: int) -> None:
        """Lay out shared memory; the 128-byte swizzle wants its base at a multiple of 1024."""
        stages, tiles = self.knobs.stages, self.rows // 16
        codes, scales = tiles * self.warp_codes, tiles * self.warp_scales
        self.ring_bytes = stages * (self.x_bytes + codes + scales)
        tile_bytes = self.knobs.block_m * (self.rows + 4) * 4
        size = max(self.ring_bytes + extra_bytes, tile_bytes) + 1024 + 16
        # a store to the last word, which nothing uses, keeps the size (see intrinsics.local); of
        # float32 like gemv's, since C++ wants one type of all kernels' `extern __shared__`
        smem = T.sblock_alloc_buffer((size // 4,), "float32", scope="shared.dyn")
        T.buffer_store(smem, tirx.const(0.0, "float32"), [size // 4 - 1])
        raw = T.bind(call("amx_smem", at(smem, 0), returns="uint32"))
        self.base = T.bind((raw + tirx.const(1023, "uint32")) & tirx.const(0xFFFFFC00, "uint32"))
        self.codes_base = self.base + self._u32(stages * self.x_bytes)
        self.scales_base = self.codes_base + self._u32(stages * codes)

    @staticmethod
    def _u32(value):
        return tirx.const(value, "uint32") if isinstance(value, int) else tirx.Cast("uint32", value)

    def do(self, name: str, *args) -> None:
        """Call a CUDA function with the text that defines it."""
        text = next(text for start, text in self.texts.items() if name.startswith(start))
        call(name, *args, text=text)

    def value(self, name: str, *args, dtype: str = "uint32"):
        """Call a CUDA function that returns something."""
        text = next(text for start, text in self.texts.items() if name.startswith(start))
        return call(name, *args, returns=dtype, text=text)

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
        sizes = stage_words(self.linear.decode)
        self.do(
            f"amx_words_{self.linear.decode.ident}",
            at(words, sizes[0] * buffer),
            at(records, sizes[1] * buffer),
            self.codes_at(slot),
            self.scales_at(slot),
            self.lane,
        )

    def decode_step(self, a, words: tirx.Buffer, records: tirx.Buffer, buffer: int, step: int):
        """Decode 16 columns of a register buffer into the 4 A registers at an address."""
        sizes = stage_words(self.linear.decode)
        self.do(
            f"amx_decode_{self.linear.decode.ident}<{step}>",
            a,
            at(words, sizes[0] * buffer),
            at(records, sizes[1] * buffer),
            at(self.coefficients, 0),
        )

    def sync(self) -> None:
        """Wait for all warps that compute."""
        if self.knobs.producer:
            self.do(f"amx_barrier_of<{self.threads}>")
        else:
            self.do("amx_barrier")

    def finish(self) -> None:
        """Publish the tile as float32 [row of x][row of W] and write y."""
        linear, stride = self.linear, self.rows + 4
        self.sync()
        for j in range(self.knobs.block_m // 8):
            for i in range(4):
                row = 8 * j + 2 * (self.lane % 4) + i % 2
                column = self.warp * 16 + self.lane // 4 + 8 * (i // 2)
                place = self.base + self._u32((row * stride + column) * 4)
                self.do("amx_sts1", place, self.acc[4 * j + i])
        if self.knobs.cluster > 1:
            self.do("amx_cluster_sync")
        else:
            self.sync()
        zero = tirx.const(0, "int32")
        unused = tirx.reinterpret("handle", tirx.const(0, "uint64"))
        self.do(
            self.finish_name,
            self.base,
            at(linear.y, zero, zero),
            unused if linear.residual is None else at(linear.residual, zero, zero),
            unused if linear.bias is None else at(linear.bias, zero),
            unused if linear.tile_scale is None else at(linear.tile_scale, zero),
            linear.m,
            self.m0,
            self.n0,
            self.rank,
            self.peer * self.knobs.cluster,
            self.tid,
            tirx.const(self.threads, "int32"),
        )
        if self.knobs.cluster > 1:
            self.do("amx_cluster_meet")  # no block may leave while another reads its tile


def emit(linear: Linear, knobs: TileKnobs, multiprocessors: int) -> None:
    """Emit the kernel; any number of rows of x, in blocks of `block_m`.

    `multiprocessors` of the GPU: how many blocks persist (a wrong number costs time alone).
    """
    from .tile_mma import MmaTile
    from .tile_persistent import PersistentTile
    from .tile_wgmma import WgmmaTile, tensor_maps

    walks = knobs.wgmma and knobs.producer and knobs.cluster == 1 and knobs.block_m >= 64
    if knobs.persistent and not walks:
        raise ValueError(
            f"persistent blocks want wgmma, a producer, cluster 1 and 64 rows of x, not {knobs}"
        )
    if knobs.wgmma and not knobs.persistent and knobs.stages % 2:
        # the sets of registers for codes and scales alternate with the slots
        raise ValueError(f"with wgmma a ring has an even number of stages, not {knobs.stages}")
    if knobs.block_m % knobs.cluster or knobs.cluster * knobs.share > 8:
        raise ValueError(
            f"a cluster has at most 8 blocks, and those that split K divide the rows of x: {knobs}"
        )
    n_tiles = -(-linear.tiles * 16 // (knobs.groups * 64))
    n_tiles = -(-n_tiles // knobs.share) * knobs.share
    m_tiles = (linear.m + knobs.block_m - 1) // knobs.block_m
    split = knobs.cluster > 1
    # both kinds of neighbours lie in x then: TVM 0.27 cannot have clusters of one and of two
    # dimensions in a module
    beside = knobs.share if split else 1
    maps = tensor_maps(linear, knobs) if knobs.wgmma else None
    blocks = multiprocessors // knobs.share * knobs.share
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
            if knobs.persistent and maps is not None:
                PersistentTile(linear, knobs, maps, by, blocks, lane=tx, warp=ty).run()
                return
            place = {
                "lane": tx,
                "warp": ty,
                "n_tile": by if beside == 1 else by * beside + bx // knobs.cluster % beside,
                "m_tile": bx // (knobs.cluster * beside) if split else bx,
                "rank": bx % knobs.cluster if split else tirx.const(0, "int32"),
            }
            if maps is not None:
                WgmmaTile(linear, knobs, maps, **place).run()
            else:
                MmaTile(linear, knobs, **place).run()
