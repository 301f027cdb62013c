"""Decode schedule for M <= 8: fragments straight from device memory into mma.sync, no shared memory.

A block computes one tile of 16 rows of W (a gate and an up tile with silu_mul); its warps split K. The
tensor core's 16-row operand is W, its 8 columns are filled from x in one of two ways:

    plain (GP = 1)           column n is row n of x; scales are applied after every group
    block-diagonal (GP > 1)  column n is row n // GP of x in group n % GP of GP consecutive groups, zero
                             in the others: one pair of chains runs over all GP groups, column n ends up
                             with group n's sum, and scales are applied once per GP groups. Exact: only
                             zeros are added. GP = 8 / M where K has that many groups.

K is walked in *chunks* (the larger of a unit and GP groups). A warp takes every `warps`-th batch of
chunks, all of a batch's weights are in flight at once, and batch 0 is requested before the activations
are waited for (programmatic dependent launch). Sums of warps meet in shared memory.

Measured on an H100 (2026-11-22): unrolling the loop over batches in full costs 7 to 41 %, a minimum of
blocks in the launch bounds spills, 32 rows a warp gain nothing. See docs/performance.md.
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

    warps : warps that share one tile's K
    inflight : 16-byte weight loads a lane has in flight
    dependent : programmatic dependent launch (sm_90 and later)
    """

    warps: int = 8
    inflight: int = 8
    dependent: bool = False


@dataclass(frozen=True)
class _Plan:
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
        return self.gp * self.group


def _plan(linear: Linear, rows: int, knobs: GemvKnobs) -> _Plan:
    shape = linear.decode.shape
    columns = linear.units * shape.unit
    group = shape.group or shape.unit
    gp = 1
    if shape.group:
        gp = 8 // rows
        while gp > 1 and columns % max(gp * group, shape.unit):
            gp //= 2
    chunk = max(shape.unit, gp * group)
    units = chunk // shape.unit
    batch = max(1, knobs.inflight // units)
    parts = 1 if gp == 1 or knobs.inflight >= units else units // knobs.inflight
    chunks = columns // chunk
    rounds = -(-chunks // (knobs.warps * batch))
    exact = chunks == rounds * knobs.warps * batch
    return _Plan(rows, gp, group, chunk, units, batch, parts, chunks, rounds, exact)


class _Warp:
    """Emits one warp's work; holds its registers and coordinates."""

    def __init__(self, linear: Linear, plan: _Plan, tile, warp, lane, warps: int):
        self.linear, self.plan, self.tile, self.warp, self.warps = linear, plan, tile, warp, warps
        self.lane = lane
        self.g, self.t = lane // 4, lane % 4
        self.text = format_text(linear.decode)
        self.name = linear.decode.ident
        shape = linear.decode.shape
        self.scaled = bool(shape.group)
        self.part_units = plan.units // plan.parts
        self.superblocks = plan.chunk // plan.superblock
        if plan.gp > 1:
            self.record_words = shape.scale_bytes  # two groups, two rows
            records = plan.batch * self.superblocks
        else:
            self.record_words = shape.record // 4
            records = plan.batch * plan.units
        self.steps_per_group = plan.group // 16
        self.words = local(plan.batch * self.part_units * 4, "uint32")
        self.records = local(records * self.record_words, "uint32")
        self.x = local(plan.batch * self.superblocks * self.steps_per_group * 2, "uint32")
        self.acc = local(8)
        self.out = local(2 if plan.gp > 1 else 4)

    def chunk_of(self, batch, c: int):
        """Index of a batch's chunk."""
        return (batch * self.warps + self.warp) * self.plan.batch + c

    def _inside(self, chunk):
        """Clamp a chunk index: its weights are then read twice and multiplied by x = 0."""
        return chunk if self.plan.exact else tirx.min(chunk, self.plan.chunks - 1)

    def load_weights(self, batch, part) -> None:
        """Request the codes of one part of a batch."""
        for c in range(self.plan.batch):
            chunk = self._inside(self.chunk_of(batch, c))
            for u in range(self.part_units):
                unit = chunk * self.plan.units + part * self.part_units + u
                word = (c * self.part_units + u) * 4
                source = at(self.linear.codes, self.tile, unit, self.lane * 16)
                call("amx_ldg_words4", at(self.words, word), source)

    def load_scales(self, batch) -> None:
        """Request the stored scales of a batch."""
        if not self.scaled:
            return
        shape, plan = self.linear.decode.shape, self.plan
        pair_bytes = 2 * shape.scale_bytes  # one group, two rows
        for c in range(plan.batch):
            chunk = self._inside(self.chunk_of(batch, c))
            if plan.gp == 1:
                for u in range(plan.units):
                    word = (c * plan.units + u) * self.record_words
                    self._scale_words(word, chunk * plan.units + u, 0, self.record_words)
                continue
            for s in range(self.superblocks):
                word = (c * self.superblocks + s) * self.record_words
                # the lane's groups: column pair (2t, 2t+1) of the block diagonal
                first = chunk * (plan.chunk // plan.group) + s * plan.gp + (2 * self.t) % plan.gp
                if shape.unit_groups > 1:
                    unit = first // shape.unit_groups
                    byte = (first % shape.unit_groups) * pair_bytes
                    self._scale_words(word, unit, byte, self.record_words)
                else:
                    half = self.record_words // 2
                    for i in range(2):
                        self._scale_words(word + i * half, first + i, 0, half)

    def _scale_words(self, word: int, unit, byte, count: int) -> None:
        source = at(
            self.linear.scales, self.tile, unit, self.g * self.linear.decode.shape.record + byte
        )
        call(f"amx_ldg_words{count}", at(self.records, word), source)

    def load_x(self, batch) -> None:
        """Load the lane's column of the x operand for a batch."""
        plan, k = self.plan, self.linear.spec.k
        row = self.g // plan.gp
        m = self.linear.m
        always = isinstance(m, int) and m * plan.gp >= 8
        safe_row = row if always else tirx.min(row, m - 1)
        full = plan.exact and plan.chunks * plan.chunk == k
        for c in range(plan.batch):
            for s in range(self.superblocks):
                start = self.chunk_of(batch, c) * plan.chunk + s * plan.superblock
                start = start + (self.g % plan.gp) * plan.group + 2 * self.t
                for p in range(self.steps_per_group):
                    for half in range(2):
                        column = start + 16 * p + 8 * half
                        word = ((c * self.superblocks + s) * self.steps_per_group + p) * 2 + half
                        inside = tirx.const(True, "bool") if always else row < m
                        if not full:
                            inside = tirx.And(inside, column < k)
                            column = tirx.min(column, k - 2)
                        loaded = call(
                            "amx_load_x",
                            at(self.linear.x, safe_row, column),
                            inside,
                            returns="uint32",
                        )
                        T.buffer_store(self.x, loaded, [word])

    def zero(self) -> None:
        """Start new chains."""
        for i in range(4 * self.linear.decode.chains):
            T.buffer_store(self.acc, tirx.const(0.0, "float32"), [i])

    def multiply(self, part) -> None:
        """Run the chains over one part of a batch that is in registers."""
        plan = self.plan
        steps = self.linear.decode.shape.unit // 16
        per_superblock = plan.superblock // 16
        for c in range(plan.batch):
            for u in range(self.part_units):
                for st in range(steps):
                    static = u * steps + st
                    superblock, inside = divmod(static, per_superblock)
                    group, p = divmod(inside, self.steps_per_group)
                    if plan.parts == 1 and inside == 0 and self.scaled:
                        self.zero()
                    dynamic = part * (self.part_units * steps // self.steps_per_group) + group
                    self._step(c, superblock, u, st, dynamic if plan.parts > 1 else group, p)
                    if plan.parts == 1 and inside == per_superblock - 1:
                        self.scale(c, superblock)

    def _step(self, c: int, superblock: int, u: int, st: int, group, p: int) -> None:
        base = ((c * self.superblocks + superblock) * self.steps_per_group + p) * 2
        b = [self.x[base], self.x[base + 1]]
        if self.plan.gp > 1:
            mine = tirx.EQ(self.g % self.plan.gp, group)
            b = [tirx.Select(mine, v, tirx.const(0, "uint32")) for v in b]
        word = (c * self.part_units + u) * 4 + st * self.linear.decode.words
        call(f"amx_step_{self.name}", at(self.acc, 0), at(self.words, word), *b, text=self.text)

    def scale(self, c: int, superblock: int) -> None:
        """Add finished chains, scaled, to the lane's sums."""
        if not self.scaled:
            return
        acc, out = at(self.acc, 0), at(self.out, 0)
        if self.plan.gp > 1:
            word = (c * self.superblocks + superblock) * self.record_words
            name = f"amx_scale_diagonal_{self.name}"
            call(name, out, acc, at(self.records, word), text=self.text)
            return
        unit, group = divmod(superblock, self.linear.decode.shape.unit_groups)
        word = (c * self.plan.units + unit) * self.record_words
        name = f"amx_scale_plain_{self.name}"
        call(name, out, acc, at(self.records, word), group, text=self.text)

    def run(self, dependent: bool) -> None:
        """Walk all batches."""
        plan = self.plan
        if dependent:
            call("amx_launch_dependents")
        for i in range(2 if plan.gp > 1 else 4):
            T.buffer_store(self.out, tirx.const(0.0, "float32"), [i])
        if not self.scaled:
            self.zero()
        self.load_weights(0, 0)
        self.load_scales(0)
        if dependent:
            call("amx_wait_prerequisites")
        with T.serial(plan.rounds, annotations={"disable_unroll": True}) as batch:
            self.load_x(batch)
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

    def publish(self, partial: tirx.Buffer, slot) -> None:
        """Write the warp's sums, [row of x][row of W], to shared memory."""
        plan = self.plan
        if plan.gp == 1:
            source = self.out if self.scaled else self.acc
            for i in range(4):
                row = 2 * self.t + i % 2
                with T.If(row < plan.rows):
                    with T.Then():
                        index = [slot, row * 16 + self.g + 8 * (i // 2)]
                        T.buffer_store(partial, source[i], index)
            return
        for mask in (1, 2):
            if mask * 2 < plan.gp:
                for h in range(2):
                    total = call(
                        "amx_shuffle_add", self.out[h], mask, returns="float32"
                    )
                    T.buffer_store(self.out, total, [h])
        row = 2 * self.t // plan.gp
        with T.If(tirx.And(tirx.EQ(2 * self.t % plan.gp, 0), row < plan.rows)):
            with T.Then():
                for h in range(2):
                    T.buffer_store(partial, self.out[h], [slot, row * 16 + self.g + 8 * h])


def emit(linear: Linear, rows: int, knobs: GemvKnobs) -> None:
    """Emit the kernel for up to `rows` (1, 2, 4 or 8) rows of x."""
    spec = linear.spec
    plan = _plan(linear, rows, knobs)
    tiles = 2 if spec.silu_mul else 1
    warps = knobs.warps
    with T.thread_binding(linear.tiles // tiles, thread="blockIdx.x") as block:
        with T.thread_binding(warps * tiles, thread="threadIdx.y") as ty:
            with T.thread_binding(32, thread="threadIdx.x") as tx:
                with T.sblock("linear"):
                    T.reads()
                    T.writes()
                    partial = T.sblock_alloc_buffer(
                        (tiles * warps, 16 * rows), "float32", scope="shared"
                    )
                    tile = block * tiles + ty // warps
                    worker = _Warp(linear, plan, tile, ty % warps, tx, warps)
                    worker.run(knobs.dependent)
                    worker.publish(partial, ty)
                    T.evaluate(T.tvm_storage_sync("shared"))
                    _reduce(linear, plan, partial, block, ty * 32 + tx, tiles, warps)


def _reduce(linear: Linear, plan: _Plan, partial, block, thread, tiles: int, warps: int) -> None:
    """Sum the warps' parts and write y."""
    threads, outputs = warps * tiles * 32, 16 * plan.rows
    factor = linear.decode.factor

    def total(part: int, index) -> tirx.Expr:
        value = partial[part * warps, index]
        for w in range(1, warps):
            value = value + partial[part * warps + w, index]
        return value

    for first in range(0, outputs, threads):
        index = thread + first
        row, lane_row = index // 16, index % 16
        with T.If(tirx.And(index < outputs, row < linear.m)):
            with T.Then():
                base = block * (16 * tiles) + lane_row
                value = epilogue.finish(linear, total(0, index), base, factor)
                if tiles == 2:
                    up = epilogue.finish(linear, total(1, index), base + 16, factor)
                    value = epilogue.gated(value, up)
                epilogue.store(linear, row, block * 16 + lane_row, value)
