"""Which schedule with which knobs a number of rows of x gets: the defaults, before any tuning.

    M        schedule
    1..8     gemv: fragments straight into mma.sync, buckets 1, 2, 4, 8
    9..128   tile: W scaled in registers; blocks of 16, 32, 64, 128 rows of x, K split over clusters
    129..    tile with blocks of 256 (or 128, 64) rows of x

Choices depend on N and K through one number: how many blocks there are for the multiprocessors. Values
were measured on an H100 (docs/performance.md); other GPUs take the same ones without its instructions.
"""

from __future__ import annotations

from dataclasses import dataclass

from amx_tvm.formats.cuda_layout import FragmentShape

from ..spec import LinearSpec
from .gemv import GemvKnobs
from .tile import STAGE_COLUMNS, TileKnobs

MULTIPROCESSORS = 132
GEMV_ROWS = (1, 2, 4, 8)
TILE_ROWS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Device:
    """What the schedules ask of an architecture name such as "sm_90a"."""

    arch: str

    @property
    def number(self) -> int:
        """Compute capability as an integer, 90 for sm_90a."""
        return int("".join(c for c in self.arch.removeprefix("sm_") if c.isdigit()))

    @property
    def wgmma(self) -> bool:
        """Whether wgmma exists: sm_90a alone, its successor has other instructions."""
        return self.arch == "sm_90a"

    @property
    def clusters(self) -> bool:
        """Whether blocks can form clusters and depend on each other's launches."""
        return self.number >= 90

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one block may take."""
        return {80: 163, 87: 163, 90: 227, 100: 227}.get(self.number, 99) * 1024


@dataclass(frozen=True)
class Bucket:
    """One range of M: the largest number of rows (None: any) and the kernel's knobs."""

    rows: int | None
    knobs: GemvKnobs | TileKnobs


def gemv_knobs(spec: LinearSpec, shape: FragmentShape, rows: int) -> GemvKnobs:
    """Warps and loads in flight for M <= 8: many warps where there are few row tiles."""
    per_warp = 2 if spec.silu_mul or rows == 8 else 1
    tiles = shape.tiles(spec.n) // per_warp
    loads = shape.units(spec.k)
    few = tiles < 3 * MULTIPROCESSORS
    warps = 16 if few else 8
    inflight = 2 if rows == 8 else 4 if few else 8
    while warps > 4 and loads < warps * inflight:
        warps //= 2
    return GemvKnobs(warps, inflight // per_warp if inflight > per_warp else 1, per_warp)


def tile_knobs(spec: LinearSpec, device: Device, rows: int) -> TileKnobs:
    """Blocks of x, ring and cluster for M > 8."""
    stages = 4 if rows >= 128 else 8
    groups = 2
    n_tiles = -(-spec.n // (64 * groups))
    cluster = 1
    while (
        device.clusters
        and cluster < 8
        and rows <= 128
        and n_tiles * cluster * 2 <= 2 * MULTIPROCESSORS
        and spec.k // (cluster * 2) >= 8 * STAGE_COLUMNS
    ):
        cluster *= 2
    return TileKnobs(rows, groups, stages, cluster, device.wgmma)


def shared_bytes(knobs: TileKnobs) -> int:
    """Upper bound of a tile kernel's shared memory, for four-bit formats."""
    rows = knobs.groups * 64
    ring = knobs.stages * (knobs.block_m * 128 + knobs.groups * 4 * 640)
    return max(ring, knobs.block_m * (rows + 4) * 4) + 1040


def fit(knobs: TileKnobs, device: Device) -> TileKnobs:
    """Shrink the ring, then the block, until the kernel fits the architecture's shared memory."""
    while shared_bytes(knobs) > device.shared_bytes:
        if knobs.stages > 4:
            knobs = TileKnobs(**{**vars(knobs), "stages": knobs.stages - 1})
        else:
            knobs = TileKnobs(**{**vars(knobs), "block_m": knobs.block_m // 2})
    return knobs


def default_buckets(spec: LinearSpec, shape: FragmentShape, device: Device) -> list[Bucket]:
    """Buckets of a linear, in rising order of rows; the last takes any M.

    `spec.m` keeps the one bucket that M falls into, `spec.m_max` drops those that cannot occur.
    """
    found = [Bucket(rows, gemv_knobs(spec, shape, rows)) for rows in GEMV_ROWS]
    found += [Bucket(rows, fit(tile_knobs(spec, device, rows), device)) for rows in TILE_ROWS]
    largest = 256 if device.wgmma else 128
    found.append(Bucket(None, fit(tile_knobs(spec, device, largest), device)))
    most = spec.m if spec.m is not None else spec.m_max
    if most is not None:
        last = next(i for i, b in enumerate(found) if b.rows is None or b.rows >= most)
        found = found[last : last + 1] if spec.m is not None else found[: last + 1]
    return [*found[:-1], Bucket(None, found[-1].knobs)] if spec.m is None else found
