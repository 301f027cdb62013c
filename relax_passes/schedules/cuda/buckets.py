"""Which schedule with which knobs a number of rows of x gets: the defaults, before any tuning.

    M        schedule
    1..16    gemv: fragments straight into mma.sync, buckets 1, 2, 4, 8, 16
    17..128  tile: W scaled in registers; blocks of 32, 64, 128 rows of x, K split over clusters
    129..    tile with blocks of 256 rows of x (128 without wgmma); K is split while M <= 512

Choices depend on N and K through one number: how many blocks there are for the multiprocessors.
Values were measured on an H100 (docs/performance.md); other GPUs take the same ones without its
instructions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from amx_tvm.formats.cuda_layout import FragmentShape

from ..spec import LinearSpec
from .gemv import GemvKnobs
from .tile import STAGE_COLUMNS, TileKnobs

MULTIPROCESSORS = 132
GEMV_ROWS = (1, 2, 4, 8, 16)
TILE_ROWS = (32, 64, 128)
SPLIT_ROWS = 512  # up to here blocks of 256 rows of x are too few without splitting K


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
    """Warps, loads in flight and tiles a warp for M <= 16.

    Few row tiles want many warps on each; many want small blocks. Two tiles a warp halve the reads
    of x, which outweigh those of W from 16 rows on (and of gate and up, which one warp must hold).
    """
    tiles = 2 if spec.silu_mul or rows == 16 else 1
    blocks = shape.tiles(spec.n) // tiles
    columns = shape.units(spec.k) * shape.unit
    long = columns >= 2048
    few = blocks < 300 // tiles  # about two blocks a multiprocessor
    if few:
        warps, inflight = 16, 4 if rows == 1 or (rows == 4 and columns >= 4096) else 2
    elif rows == 1:
        warps, inflight = (16, 2) if blocks < 3 * MULTIPROCESSORS else (8, 4)
    else:
        warps, inflight = (8, 4) if blocks < 4 * MULTIPROCESSORS else (4, 4)
    if rows == 8 and long and not spec.silu_mul:
        # x takes the registers of the loads: half of them, and one where K is soon walked
        inflight = 1 if few and columns <= 4096 else 2
    if rows == 16:
        warps, inflight = (16, 2) if blocks < 150 else (8, 2)
        if long and not spec.silu_mul and not (few and columns > 4096):
            warps, inflight = 16 if few else 8 if blocks < 4 * MULTIPROCESSORS else 4, 1
    if rows in (1, 4, 8) and columns % (14 * 256) == 0:
        # K = 14336 and its like: no warp idles in the last round
        warps, inflight = 14, 2 if rows == 8 else 4
    if spec.silu_mul:
        # two tiles a warp load twice as much; 1 and 8 rows of a long K still gain from all of it
        inflight = inflight if rows in (1, 8) and spec.k >= 4096 else max(1, inflight // 2)
    while warps > 4 and shape.units(spec.k) < warps * inflight:
        warps //= 2
    return GemvKnobs(warps, inflight, tiles)


def tile_knobs(spec: LinearSpec, device: Device, rows: int) -> TileKnobs:
    """Blocks of x, ring, cluster and roles for M > 16."""
    n_tiles = -(-spec.n // 128)
    depth = spec.k // STAGE_COLUMNS
    cluster = 1
    if device.clusters:
        # up to two blocks a multiprocessor, one where a block takes all registers or columns are
        # many
        slots = MULTIPROCESSORS * (1 if rows >= 128 else 2)
        m_blocks = 2 if rows == 256 else 1
        most = 8 if rows <= 64 and depth >= 128 else 2 if rows >= 128 else 4
        while cluster < most and n_tiles * m_blocks * cluster * 2 <= slots:
            cluster *= 2
        while cluster > 1 and depth // cluster < 8:
            cluster //= 2
    stages = {32: 6, 64: 6, 128: 5, 256: 5}[rows]
    return TileKnobs(rows, 2, stages, cluster, device.wgmma, device.wgmma)


def shared_bytes(knobs: TileKnobs, shape: FragmentShape) -> int:
    """Shared memory of a tile kernel."""
    rows, units = knobs.groups * 64, STAGE_COLUMNS // shape.unit
    weights = knobs.groups * 4 * units * (512 + 8 * shape.record)
    ring = knobs.stages * (knobs.block_m * 128 + weights + 16)
    return max(ring, knobs.block_m * (rows + 4) * 4) + 1040


def fit(knobs: TileKnobs, shape: FragmentShape, device: Device) -> TileKnobs:
    """Shrink the ring, then the block, until the kernel fits the architecture's shared memory."""
    while shared_bytes(knobs, shape) > device.shared_bytes:
        if knobs.stages > 4:
            knobs = replace(knobs, stages=knobs.stages - 1)
        else:
            knobs = replace(knobs, block_m=knobs.block_m // 2)
    return knobs


def default_buckets(spec: LinearSpec, shape: FragmentShape, device: Device) -> list[Bucket]:
    """Buckets of a linear, in rising order of rows; the last takes any M.

    `spec.m` keeps the one bucket that M falls into, `spec.m_max` drops those that cannot occur.
    """
    found = [Bucket(rows, gemv_knobs(spec, shape, rows)) for rows in GEMV_ROWS]
    found += [
        Bucket(rows, fit(tile_knobs(spec, device, rows), shape, device)) for rows in TILE_ROWS
    ]
    largest = 256 if device.wgmma else 128
    split = fit(tile_knobs(spec, device, largest), shape, device)
    whole = replace(split, cluster=1)
    if split != whole:
        found.append(Bucket(SPLIT_ROWS, split))
    found.append(Bucket(None, whole))
    most = spec.m if spec.m is not None else spec.m_max
    if most is not None:
        last = next(i for i, b in enumerate(found) if b.rows is None or b.rows >= most)
        found = found[last : last + 1] if spec.m is not None else found[: last + 1]
    return [*found[:-1], Bucket(None, found[-1].knobs)] if spec.m is None else found
