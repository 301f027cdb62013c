"""One warp of the decode schedule: its loads, its products, its registers (picture: gemv.py)."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..intrinsics import products
from ..intrinsics.base import at, local
from ..intrinsics.memory import COPY16_L1, COPY_COMMIT, LOAD_WEIGHTS, MATRIX, SHARED_ADDRESS
from ..intrinsics.sync import FETCH_WAIT, LAUNCH_DEPENDENTS, WAIT_PREREQUISITES, WARP_SYNC
from .buffers import Linear
from .gemv_plan import GemvKnobs, Plan


class Warp:
    """Emits one warp's work; holds its registers and coordinates."""

    def __init__(self, linear: Linear, plan: Plan, knobs: GemvKnobs, block, warp, lane, stage):
        self.linear, self.plan, self.knobs = linear, plan, knobs
        self.block, self.warp, self.lane = block, warp, lane
        self.g, self.t = lane // 4, lane % 4
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
        self.set_words = tiles * self.words_per_tile
        self.set_records = tiles * self.records_per_tile
        self.words = local(plan.buffers * self.set_words, "uint32")
        self.records = local(plan.buffers * self.set_records * self.record_words, "uint32")
        self.x = local(plan.operands, "uint32")
        self.wide = plan.wide
        self.sums = max(8, 4 * plan.column_tiles)  # accumulators of a tile
        self.acc = local(tiles * self.sums)
        self.out = local(tiles * self.outs)
        self.stage = T.bind(SHARED_ADDRESS(stage))

    def _tile(self, i: int):
        return tirx.min(self.block * self.knobs.tiles + i, self.linear.tiles - 1)

    def _chunk(self, batch, c: int):
        return (batch * self.knobs.warps + self.warp) * self.plan.batch + c

    def _inside(self, chunk):
        """Clamp a chunk index: its weights are then read twice and multiplied by x = 0."""
        return chunk if self.plan.exact else tirx.min(chunk, self.plan.chunks - 1)

    def load_weights(self, batch, part, buffer: int = 0) -> None:
        """Request the codes of one part of a batch."""
        for i in range(self.knobs.tiles):
            for c in range(self.plan.batch):
                chunk = self._inside(self._chunk(batch, c))
                for u in range(self.part_units):
                    unit = chunk * self.plan.units + part * self.part_units + u
                    word = buffer * self.set_words + i * self.words_per_tile
                    word += (c * self.part_units + u) * 4
                    place = self.linear.place(self._tile(i), unit)
                    source = at(self.linear.codes, *place, self.lane * 16)
                    LOAD_WEIGHTS[4](at(self.words, word), source)

    def load_scales(self, batch, buffer: int = 0) -> None:
        """Request the stored scales of a batch."""
        if not self.scaled:
            return
        shape, plan = self.linear.decode.shape, self.plan
        pair_bytes = 2 * shape.scale_bytes  # one group, two rows
        size = self.record_words
        for i in range(self.knobs.tiles):
            for c in range(plan.batch):
                chunk = self._inside(self._chunk(batch, c))
                first_word = buffer * self.set_records + i * self.records_per_tile
                first_word = (first_word + c * self.records_per_tile // plan.batch) * size
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
        place = self.linear.place(self._tile(i), unit)
        source = at(self.linear.scales, *place, self.g * record + byte)
        LOAD_WEIGHTS[count](at(self.records, word), source)

    def fetch_x(self, batch, buffer: int = 0) -> None:
        """Copy the batch's superblocks of x to the warp's shared memory, one piece a lane each."""
        plan, k, m = self.plan, self.linear.columns, self.linear.m
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
            slot = (buffer * plan.operands // plan.pieces + index) * 8 * plan.pieces
            target = self.stage + tirx.Cast("uint32", (slot + place) * 16)
            source = at(self.linear.x, self.linear.x_row(safe_row), column)
            if plan.pieces == 4:
                COPY16_L1(target, source, inside)
            else:
                with T.If(self.t < plan.pieces):
                    with T.Then():
                        COPY16_L1(target, source, inside)
        COPY_COMMIT()

    def _place(self, column, piece):
        """Place of a 16-byte piece of a superblock, see the module docstring."""
        return piece * 8 + tirx.bitwise_xor(column, piece * 2)

    def read_x(self, buffer: int = 0) -> None:
        """Read the batch's x operand from shared memory."""
        plan = self.plan
        FETCH_WAIT[plan.buffers - 1]()
        first = buffer * plan.operands // plan.pieces
        matrix = self.lane // 8 if plan.pieces == 4 else (self.lane // 8) % 2
        place = self._place(self.lane % 8, matrix)
        for s in range(plan.batch * plan.superblocks * plan.column_tiles):
            offset = tirx.Cast("uint32", ((first + s) * 8 * plan.pieces + place) * 16)
            MATRIX[plan.pieces](at(self.x, s * plan.pieces), self.stage + offset)
        if plan.rounds > 1:
            WARP_SYNC()

    def zero(self) -> None:
        """Start new chains."""
        plan = self.plan
        for i in range(self.knobs.tiles):
            count = 4 * plan.column_tiles if self.wide else 4 * self.linear.decode.chains
            for j in range(count):
                T.buffer_store(self.acc, tirx.const(0.0, "float32"), [self.sums * i + j])

    def multiply(self, part, buffer: int = 0) -> None:
        """Run the chains over one part of a batch that is in registers."""
        plan = self.plan
        steps = self.linear.decode.shape.unit // 16
        per_superblock, per_group = plan.superblock // 16, plan.group // 16
        for c in range(plan.batch):
            for u in range(self.part_units):
                for st in range(steps):
                    superblock, inside = divmod(u * steps + st, per_superblock)
                    group, p = divmod(inside, per_group)
                    if plan.parts > 1:
                        group = part * (self.part_units * steps // per_group) + group
                    fresh = plan.parts == 1 and inside == 0 and self.scaled
                    self._step(buffer, c, superblock, u, st, group, p, fresh)
                    if plan.parts == 1 and inside == per_superblock - 1:
                        self.scale(buffer, c, superblock)

    def _step(
        self, buffer: int, c: int, superblock: int, u: int, st: int, group, p: int, fresh: bool
    ) -> None:
        """Multiply 16 columns; `fresh` starts new chains."""
        plan = self.plan
        base = (c * plan.superblocks + superblock) * plan.column_tiles * plan.pieces + 2 * p
        if self.wide:
            self._wide_step(buffer, c, superblock, u, st, base)
            return
        b = [self.x[base], self.x[base + 1]]
        if self.plan.gp > 1:
            mine = tirx.EQ(self.g % self.plan.gp, group)
            b = [tirx.Select(mine, v, tirx.const(0, "uint32")) for v in b]
        for i in range(self.knobs.tiles):
            word = self._word(buffer, i, c, u) + st * self.linear.decode.words
            acc, words = at(self.acc, self.sums * i), at(self.words, word)
            products.step(self.linear.decode)[fresh](acc, words, *b)

    def _word(self, buffer: int, i: int, c: int, u: int) -> int:
        """First register of a unit's codes."""
        tile = buffer * self.set_words + i * self.words_per_tile
        return tile + (c * self.part_units + u) * 4

    def _record(self, buffer: int, i: int, index: int) -> int:
        """First register of a record of a batch."""
        first = buffer * self.set_records + i * self.records_per_tile
        return (first + index) * self.record_words

    def _wide_step(self, buffer: int, c: int, superblock: int, u: int, st: int, base: int) -> None:
        plan, decode = self.plan, self.linear.decode
        group = superblock % decode.shape.unit_groups if self.scaled else 0
        for i in range(self.knobs.tiles):
            word = self._word(buffer, i, c, u) + st * decode.words
            record = self._record(buffer, i, c * plan.units + u)
            products.wide(self.linear.decode)[plan.column_tiles](
                at(self.acc, self.sums * i),
                at(self.words, word),
                at(self.records, record if self.scaled else 0),
                group,
                at(self.x, base),
                plan.pieces,
            )

    def scale(self, buffer: int, c: int, superblock: int) -> None:
        """Add finished chains, scaled, to the lane's sums."""
        if not self.scaled or self.wide:
            return
        for i in range(self.knobs.tiles):
            acc, out = at(self.acc, self.sums * i), at(self.out, self.outs * i)
            if self.plan.gp > 1:
                record = self._record(buffer, i, c * self.plan.superblocks + superblock)
                products.scale_diagonal(self.linear.decode)(out, acc, at(self.records, record))
            else:
                unit, inside = divmod(superblock, self.linear.decode.shape.unit_groups)
                record = self._record(buffer, i, c * self.plan.units + unit)
                products.scale_plain(self.linear.decode)(out, acc, at(self.records, record), inside)

    def request(self, batch, buffer: int = 0) -> None:
        """Request all of a batch."""
        self.load_weights(batch, 0, buffer)
        self.load_scales(batch, buffer)
        self.fetch_x(batch, buffer)

    def run(self) -> None:
        """Walk all batches."""
        plan, dependent = self.plan, self.knobs.dependent
        if dependent:
            LAUNCH_DEPENDENTS()
        for i in range(self.knobs.tiles * self.outs):
            T.buffer_store(self.out, tirx.const(0.0, "float32"), [i])
        if not self.scaled or self.wide:
            self.zero()
        self.load_weights(0, 0)
        self.load_scales(0)
        if plan.buffers == 2:
            self.load_weights(1, 0, 1)
            self.load_scales(1, 1)
        if dependent:
            WAIT_PREREQUISITES()
        self.fetch_x(0)
        if plan.buffers == 1:
            self._one_buffer()
        else:
            self._two_buffers()

    def _one_buffer(self) -> None:
        plan = self.plan
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
                self.scale(0, 0, 0)
            if plan.rounds > 1:
                with T.If(batch < plan.rounds - 1):
                    with T.Then():
                        self.request(batch + 1)

    def _two_buffers(self) -> None:
        rounds = self.plan.rounds
        with T.serial(rounds // 2, annotations={"disable_unroll": True}) as pair:
            self.fetch_x(pair * 2 + 1, 1)
            self.read_x(0)
            self.multiply(0, 0)
            with T.If(pair * 2 + 2 < rounds):
                with T.Then():
                    self.request(pair * 2 + 2, 0)
                with T.Else():
                    COPY_COMMIT()
            self.read_x(1)
            self.multiply(0, 1)
            with T.If(pair * 2 + 3 < rounds):
                with T.Then():
                    self.load_weights(pair * 2 + 3, 0, 1)
                    self.load_scales(pair * 2 + 3, 1)
        if rounds % 2:
            COPY_COMMIT()
            self.read_x(0)
            self.multiply(0, 0)
