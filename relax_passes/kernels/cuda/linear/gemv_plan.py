"""Knobs and loop extents of the decode schedule (picture: gemv.py)."""

from __future__ import annotations

from dataclasses import dataclass

from .buffers import Linear


@dataclass(frozen=True)
class GemvKnobs:
    """Free choices of the schedule.

    warps : warps that share the block's K
    inflight : 16-byte weight loads a lane has in flight for each tile
    tiles : tiles of 16 rows a warp computes; more reuse x more often (silu_mul: even)
    buffers : 2 loads the next batch while one is multiplied, 1 behind it
    diagonal : groups of columns side by side in the tensor core's 8 columns, a power of 2; as many
        as fit, 8 / M, at most. Fewer make a chunk shorter, so that warps share K more evenly
    dependent : programmatic dependent launch (sm_90 and later)
    scaled_weights : apply scales to W in float16 registers, as always for more than 8 rows, not to
        the sums of groups: half the products, and no block-diagonal form
    """

    warps: int = 8
    inflight: int = 8
    tiles: int = 1
    buffers: int = 1
    diagonal: int = 8
    dependent: bool = False
    scaled_weights: bool = False


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
    buffers: int  # sets of registers and of x in shared memory
    exact: bool  # no batch reaches beyond the last chunk
    wide: bool  # scales are applied to W in registers

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
    gp, wide = 1, rows > 8 or knobs.scaled_weights
    if shape.group and not wide:
        gp = max(1, min(8 // rows, knobs.diagonal))
        while gp > 1 and columns % max(gp * group, shape.unit):
            gp //= 2
    chunk = max(shape.unit, gp * group)
    units = chunk // shape.unit
    batch = max(1, knobs.inflight // units)
    parts = 1 if gp == 1 or knobs.inflight >= units else units // knobs.inflight
    chunks = columns // chunk
    rounds = -(-chunks // (knobs.warps * batch))
    exact = chunks == rounds * knobs.warps * batch
    buffers = min(knobs.buffers, rounds) if parts == 1 else 1
    return Plan(rows, gp, group, chunk, units, batch, parts, chunks, rounds, buffers, exact, wide)
