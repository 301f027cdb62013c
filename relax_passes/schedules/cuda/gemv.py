"""Decode schedule for M <= 16: weight fragments straight from device memory into mma.sync.

A warp computes `tiles` tiles of 16 rows of W over a part of K; the warps of a block split K and
meet in shared memory (gate and up are the two tiles of a warp with silu_mul). The tensor core's
16-row operand is W, its 8 columns are filled from x in one of two ways:

    plain (GP = 1)           column n is row n of x; scales are applied after every group
    block-diagonal (GP > 1)  column n is row n // GP of x in group n % GP of GP consecutive groups,
    zero
                             in the others: one pair of chains runs over all GP groups, column n
                             ends up with group n's sum, and scales are applied once per GP groups.
                             Exact: only zeros are added. GP = 8 / M where K has that many groups.

The GP groups of 8 columns are a *superblock*: 8 x group values of x, 16 bytes a lane for groups of
32. Each warp copies its own superblocks to its own shared memory and reads them back with one
ldmatrix: lane (g, t) brings 16-byte piece t of column g to place  8 t + (g ^ 2 t), free of bank
conflicts both ways.

For M = 9..16 (plain only, two tiles of 8 columns) the scales are applied to the weights in
registers and one chain runs over all of K: a second chain would cost more than touching every
weight.

K is walked in *chunks* (the larger of a unit and a superblock). A warp takes every `warps`-th batch
of chunks, all of a batch's weights are in flight at once, and batch 0 is requested before the
activations are waited for (programmatic dependent launch).
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from . import epilogue
from .buffers import Linear
from .intrinsics import at, call, format_text, local


@dataclass(frozen=True)
class GemvKnobs:
    """Free choices of the schedule.

    warps : warps that share the block's K
    inflight : 16-byte weight loads a lane has in flight for each tile
    tiles : tiles of 16 rows a warp computes; more reuse x more often (silu_mul: even)
    dependent : programmatic dependent launch (sm_90 and later)
    """

    warps: int = 8
    inflight: int = 8
    tiles: int = 1
    dependent: bool = False


@dataclass(frozen=True)
class Plan:
    """Loop extents that follow from sizes and knobs (see the module docstring)."""

    rows: int  # rows of x that the kernel handles
    gp: int
    group: int
    chunk: int  # columns
    units: int  # units in a chunk
    batch: int  # chunks in a batch
    parts: int  # loads of a chunk are split in this many rounds
    chunks: int
    rounds: int  # batches a warp walks
    exact: bool  # no batch reaches beyond the last chunk

    @property
    def superblock(self) -> int:
        """Columns of a superblock."""
        return self.gp * self.group

    @property
    def superblocks(self) -> int:
        """Superblocks in a chunk."""
        return self.chunk // self.superblock

    @property
    def column_tiles(self) -> int:
        """Tiles of 8 columns of the x operand."""
        return max(1, self.rows // 8)

    @property
    def operands(self) -> int:
        """Registers of the x operand for one batch."""
        return self.batch * self.superblocks * self.column_tiles * self.pieces

    @property
    def pieces(self) -> int:
        """16-byte pieces of x in one column of a superblock: registers of the x operand."""
        return self.group // 8


def plan_of(linear: Linear, rows: int, knobs: GemvKnobs) -> Plan:
    """Derive the loop extents of a kernel for up to `rows` rows of x."""
    shape = linear.decode.shape
    columns = linear.units * shape.unit
    group = shape.group or 32
    gp = 1
    if shape.group:
        gp = max(1, 8 // rows)
        while gp > 1 and columns % max(gp * group, shape.unit):
            gp //= 2
    chunk = max(shape.unit, gp * group)
    units = chunk // shape.unit
    batch = max(1, knobs.inflight // units)
    parts = 1 if gp == 1 or knobs.inflight >= units else units // knobs.inflight
    chunks = columns // chunk
    rounds = -(-chunks // (knobs.warps * batch))
    exact = chunks == rounds * knobs.warps * batch
    return Plan(rows, gp, group, chunk, units, batch, parts, chunks, rounds, exact)


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


class _Warp:
    """Emits one warp's work; holds its registers and coordinates."""

    def __init__(self, linear: Linear, plan: Plan, knobs: GemvKnobs, block, warp, lane, stage):
        self.linear, self.plan, self.knobs = linear, plan, knobs
        self.block, self.warp, self.lane = block, warp, lane
        self.g, self.t = lane // 4, lane % 4
        self.text, self.name = format_text(linear.decode), linear.decode.ident
        shape = linear.decode.shape
        self.scaled = bool(shape.group)
        self.part_units = plan.units // plan.parts
        if plan.gp > 1:
            self.record_words = shape.scale_bytes  # two groups, two rows
            self.records_per_tile = plan.batch * plan.superblocks
        else:
            self.record_words = shape.record // 4
            self.records_per_tile = plan.batch * plan.units
        self.words_per_tile = plan.batch * self.part_units * 4
        self.outs = 2 if plan.gp > 1 else 4
        tiles = knobs.tiles
        self.words = local(tiles * self.words_per_tile, "uint32")
        self.records = local(tiles * self.records_per_tile * self.record_words, "uint32")
        self.x = local(plan.operands, "uint32")
        self.wide = plan.rows > 8
        self.sums = max(8, 4 * plan.column_tiles)  # accumulators of a tile
        self.acc = local(tiles * self.sums)
        self.out = local(tiles * self.outs)
        self.stage = T.bind(call("amx_smem", stage, returns="uint32"))

    def _tile(self, i: int):
        return tirx.min(self.block * self.knobs.tiles + i, self.linear.tiles - 1)

    def _chunk(self, batch, c: int):
        return (batch * self.knobs.warps + self.warp) * self.plan.batch + c

    def _inside(self, chunk):
        """Clamp a chunk index: its weights are then read twice and multiplied by x = 0."""
        return chunk if self.plan.exact else tirx.min(chunk, self.plan.chunks - 1)

    def load_weights(self, batch, part) -> None:
        """Request the codes of one part of a batch."""
        for i in range(self.knobs.tiles):
            for c in range(self.plan.batch):
                chunk = self._inside(self._chunk(batch, c))
                for u in range(self.part_units):
                    unit = chunk * self.plan.units + part * self.part_units + u
                    word = i * self.words_per_tile + (c * self.part_units + u) * 4
                    source = at(self.linear.codes, self._tile(i), unit, self.lane * 16)
                    call("amx_ldg_words4", at(self.words, word), source)

    def load_scales(self, batch) -> None:
        """Request the stored scales of a batch."""
        if not self.scaled:
            return
        shape, plan = self.linear.decode.shape, self.plan
        pair_bytes = 2 * shape.scale_bytes  # one group, two rows
        size = self.record_words
        for i in range(self.knobs.tiles):
            for c in range(plan.batch):
                chunk = self._inside(self._chunk(batch, c))
                first_word = (
                    i * self.records_per_tile + c * self.records_per_tile // plan.batch
                ) * size
                if plan.gp == 1:
                    for u in range(plan.units):
                        self._scale_words(i, first_word + u * size, chunk * plan.units + u, 0, size)
                    continue
                for s in range(plan.superblocks):
                    word = first_word + s * size
                    # the lane's groups: column pair (2t, 2t+1) of the block diagonal
                    first = (
                        chunk * (plan.chunk // plan.group) + s * plan.gp + (2 * self.t) % plan.gp
                    )
                    if shape.unit_groups > 1:
                        unit, byte = first // shape.unit_groups, first % shape.unit_groups
                        self._scale_words(i, word, unit, byte * pair_bytes, size)
                    else:
                        for j in range(2):
                            self._scale_words(i, word + j * (size // 2), first + j, 0, size // 2)

    def _scale_words(self, i: int, word: int, unit, byte, count: int) -> None:
        record = self.linear.decode.shape.record
        source = at(self.linear.scales, self._tile(i), unit, self.g * record + byte)
        call(f"amx_ldg_words{count}", at(self.records, word), source)

    def fetch_x(self, batch) -> None:
        """Copy the batch's superblocks of x to the warp's shared memory, one piece a lane each."""
        plan, k, m = self.plan, self.linear.spec.k, self.linear.m
        always = isinstance(m, int) and m * plan.gp >= 8 * plan.column_tiles
        full = plan.exact and plan.chunks * plan.chunk == k
        tiles = plan.column_tiles
        for index in range(plan.batch * plan.superblocks * tiles):
            c, rest = divmod(index, plan.superblocks * tiles)
            s, n = divmod(rest, tiles)
            row = self.g // plan.gp + 8 * n
            safe_row = row if always else tirx.min(row, m - 1)
            start = self._chunk(batch, c) * plan.chunk + s * plan.superblock
            column = start + (self.g % plan.gp) * plan.group + 8 * self.t
            inside = tirx.const(True, "bool") if always else row < m
            if not full:
                inside = tirx.And(inside, column < k)
                column = tirx.min(column, k - 8)
            place = self._place(self.g, self.t)
            slot = index * 8 * plan.pieces
            args = (
                self.stage + tirx.Cast("uint32", (slot + place) * 16),
                at(self.linear.x, safe_row, column),
                inside,
            )
            if plan.pieces == 4:
                call("amx_fetch_x", *args)
            else:
                with T.If(self.t < plan.pieces):
                    with T.Then():
                        call("amx_fetch_x", *args)

    def _place(self, column, piece):
        """Place of a 16-byte piece of a superblock, see the module docstring."""
        return piece * 8 + tirx.bitwise_xor(column, piece * 2)

    def read_x(self) -> None:
        """Read the batch's x operand from shared memory."""
        plan = self.plan
        call("amx_fetch_done")
        matrix = self.lane // 8 if plan.pieces == 4 else (self.lane // 8) % 2
        place = self._place(self.lane % 8, matrix)
        for s in range(plan.batch * plan.superblocks * plan.column_tiles):
            offset = tirx.Cast("uint32", (s * 8 * plan.pieces + place) * 16)
            call(f"amx_matrix{plan.pieces}", at(self.x, s * plan.pieces), self.stage + offset)
        if plan.rounds > 1:
            call("amx_warp_sync")

    def zero(self) -> None:
        """Start new chains."""
        plan = self.plan
        for i in range(self.knobs.tiles):
            count = 4 * plan.column_tiles if self.wide else 4 * self.linear.decode.chains
            for j in range(count):
                T.buffer_store(self.acc, tirx.const(0.0, "float32"), [self.sums * i + j])

    def multiply(self, part) -> None:
        """Run the chains over one part of a batch that is in registers."""
        plan = self.plan
        steps = self.linear.decode.shape.unit // 16
        per_superblock, per_group = plan.superblock // 16, plan.group // 16
        for c in range(plan.batch):
            for u in range(self.part_units):
                for st in range(steps):
                    superblock, inside = divmod(u * steps + st, per_superblock)
                    group, p = divmod(inside, per_group)
                    if plan.parts == 1 and inside == 0 and self.scaled and not self.wide:
                        self.zero()
                    if plan.parts > 1:
                        group = part * (self.part_units * steps // per_group) + group
                    self._step(c, superblock, u, st, group, p)
                    if plan.parts == 1 and inside == per_superblock - 1:
                        self.scale(c, superblock)

    def _step(self, c: int, superblock: int, u: int, st: int, group, p: int) -> None:
        plan = self.plan
        base = (c * plan.superblocks + superblock) * plan.column_tiles * plan.pieces + 2 * p
        if self.wide:
            self._wide_step(c, superblock, u, st, base)
            return
        b = [self.x[base], self.x[base + 1]]
        if self.plan.gp > 1:
            mine = tirx.EQ(self.g % self.plan.gp, group)
            b = [tirx.Select(mine, v, tirx.const(0, "uint32")) for v in b]
        for i in range(self.knobs.tiles):
            word = i * self.words_per_tile + (c * self.part_units + u) * 4
            word += st * self.linear.decode.words
            acc, words = at(self.acc, self.sums * i), at(self.words, word)
            call(f"amx_step_{self.name}", acc, words, *b, text=self.text)

    def _wide_step(self, c: int, superblock: int, u: int, st: int, base: int) -> None:
        plan, decode = self.plan, self.linear.decode
        group = superblock % decode.shape.unit_groups if self.scaled else 0
        for i in range(self.knobs.tiles):
            word = i * self.words_per_tile + (c * self.part_units + u) * 4 + st * decode.words
            record = (i * self.records_per_tile + c * plan.units + u) * self.record_words
            call(
                f"amx_wide_{self.name}<{plan.column_tiles}>",
                at(self.acc, self.sums * i),
                at(self.words, word),
                at(self.records, record if self.scaled else 0),
                tirx.const(group, "int32"),
                at(self.x, base),
                tirx.const(plan.pieces, "int32"),
                text=self.text,
            )

    def scale(self, c: int, superblock: int) -> None:
        """Add finished chains, scaled, to the lane's sums."""
        if not self.scaled or self.wide:
            return
        for i in range(self.knobs.tiles):
            acc, out = at(self.acc, self.sums * i), at(self.out, self.outs * i)
            first = i * self.records_per_tile
            if self.plan.gp > 1:
                word = (first + c * self.plan.superblocks + superblock) * self.record_words
                record = at(self.records, word)
                call(f"amx_scale_diagonal_{self.name}", out, acc, record, text=self.text)
            else:
                unit, group = divmod(superblock, self.linear.decode.shape.unit_groups)
                record = at(self.records, (first + c * self.plan.units + unit) * self.record_words)
                call(f"amx_scale_plain_{self.name}", out, acc, record, group, text=self.text)

    def run(self) -> None:
        """Walk all batches."""
        plan, dependent = self.plan, self.knobs.dependent
        if dependent:
            call("amx_launch_dependents")
        for i in range(self.knobs.tiles * self.outs):
            T.buffer_store(self.out, tirx.const(0.0, "float32"), [i])
        if not self.scaled or self.wide:
            self.zero()
        self.load_weights(0, 0)
        self.load_scales(0)
        if dependent:
            call("amx_wait_prerequisites")
        self.fetch_x(0)
        with T.serial(plan.rounds, annotations={"disable_unroll": True}) as batch:
            self.read_x()
            if plan.parts == 1:
                self.multiply(0)
            else:
                self.zero()
                with T.serial(plan.parts, annotations={"disable_unroll": True}) as part:
                    self.multiply(part)
                    with T.If(part < plan.parts - 1):
                        with T.Then():
                            self.load_weights(batch, part + 1)
                self.scale(0, 0)
            if plan.rounds > 1:
                with T.If(batch < plan.rounds - 1):
                    with T.Then():
                        self.load_weights(batch + 1, 0)
                        self.load_scales(batch + 1)
                        self.fetch_x(batch + 1)

    def publish(self, partial: _Partial) -> None:
        """Write the warp's sums, [tile][warp][row of x][row of W], to shared memory."""
        for i in range(self.knobs.tiles):
            self._publish_tile(partial, i)

    def _publish_tile(self, partial: _Partial, tile: int) -> None:
        plan = self.plan
        if plan.gp == 1:
            in_out = self.scaled and not self.wide
            source, first = (self.out, 4 * tile) if in_out else (self.acc, self.sums * tile)
            for i in range(4 * plan.column_tiles):
                row = 2 * self.t + i % 2 + 8 * (i // 4)
                with T.If(row < plan.rows):
                    with T.Then():
                        place = row * 16 + self.g + 8 * (i // 2 % 2)
                        partial.store(tile, self.warp, place, source[first + i])
            return
        out = [2 * tile, 2 * tile + 1]
        for mask in (1, 2):
            if mask * 2 < plan.gp:
                for o in out:
                    total = call("amx_shuffle_add", self.out[o], mask, returns="float32")
                    T.buffer_store(self.out, total, [o])
        row = 2 * self.t // plan.gp
        with T.If(tirx.And(tirx.EQ(2 * self.t % plan.gp, 0), row < plan.rows)):
            with T.Then():
                for h, o in enumerate(out):
                    partial.store(tile, self.warp, row * 16 + self.g + 8 * h, self.out[o])


def emit(linear: Linear, rows: int, knobs: GemvKnobs) -> None:
    """Emit the kernel for up to `rows` (1, 2, 4, 8 or 16) rows of x."""
    plan = plan_of(linear, rows, knobs)
    warps, tiles = knobs.warps, knobs.tiles
    threads = [
        T.thread_binding(-(-linear.tiles // tiles), thread="blockIdx.x"),
        T.thread_binding(warps, thread="threadIdx.y"),
        T.thread_binding(32, thread="threadIdx.x"),
    ]
    with T.frame_scope(threads) as (block, ty, tx):
        with T.sblock("linear"):
            T.reads()
            T.writes()
            # One buffer: TVM would give two that it thinks never live together the same bytes,
            # while slower warps still read x. The sums lie behind the warps' pieces of x, or in
            # their place after a barrier where both together would pass 48 KB.
            words, sums = plan.operands * 8 * 4, tiles * warps * 16 * rows
            overlaid = (warps * words + sums + 1) * 4 > 49152
            size = max(warps * words, sums) if overlaid else warps * words + sums
            # the last element is used by nobody: a store to it keeps the size (see
            # intrinsics.local)
            shared = T.sblock_alloc_buffer((size + 1,), "float32", scope="shared.dyn")
            T.buffer_store(shared, tirx.const(0.0, "float32"), [size])
            partial = _Partial(shared, 0 if overlaid else warps * words, warps, 16 * rows)
            stage = at(shared, ty * words)
            worker = _Warp(linear, plan, knobs, block, ty, tx, stage)
            worker.run()
            if overlaid:
                T.evaluate(T.tvm_storage_sync("shared"))
            worker.publish(partial)
            T.evaluate(T.tvm_storage_sync("shared"))
            _reduce(linear, plan, knobs, partial, block, ty * 32 + tx)


def _reduce(linear: Linear, plan: Plan, knobs: GemvKnobs, partial, block, thread) -> None:
    """Sum the warps' parts and write y."""
    threads = knobs.warps * 32
    factor = linear.decode.half_factor if plan.rows > 8 else linear.decode.factor
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
                    value = epilogue.gated(value, up)
                epilogue.store(linear, row, (block * pairs + pair) * 16 + tile_row, value)
