"""Which schedule with which knobs a number of rows of x gets: the defaults, before any tuning.

    M        schedule
    1..8     gemv: fragments straight into mma.sync, buckets 1, 2, 4, 8
    9..16    gemv where row tiles are few or there is no wgmma, else tile
    17..128  tile: W scaled in registers; blocks of 32, 64, 128 rows of x, K split over clusters
    129..512 tile with blocks of 256 rows of x (128 without wgmma); by the number of row tiles K is
             split, blocks are smaller, or they walk over tiles and halve the last ones; up to 256
             rows blocks are made for as many multiprocessors as there are (`_whole_knobs`)
    513..    tile with blocks of 256 rows of x

A linear whose activations are E4M3 multiplies that from 33 rows on (`e4m3_knobs`).

Choices depend on N, K and the GPU through one number: how many blocks there are for its
multiprocessors. Values were measured on an H100 (docs/performance-gpu.md); other GPUs take the same
ones without its instructions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2

from amx_tvm.formats.cuda_layout import FragmentShape
from amx_tvm.targets.cuda.gpus import Gpu
from relax_passes.activation import E4M3_ROWS
from relax_passes.spec import LinearSpec

from ..intrinsics.e4m3 import TABLE_BYTES
from .buffers import in_e4m3
from .gemv_plan import GemvKnobs
from .tile_persistent import SCRATCH_BYTES
from .tile_plan import STAGE_BYTES, TileKnobs

GEMV_ROWS = (1, 2, 4, 8, 16)
TILE_ROWS = (32, 64, 128)
WHOLE_ROWS = 256
_EVEN = 1.1  # a tenth more than K at most is read
SPLIT_ROWS = 512  # up to here blocks of 256 rows of x leave many multiprocessors idle


@dataclass(frozen=True)
class Bucket:
    """One range of M: the largest number of rows (None: any) and the kernel's knobs.

    A mixture's kernel also says how many rows of one expert a block has (experts.py).
    """

    rows: int | None
    knobs: GemvKnobs | TileKnobs
    item: int = 0


def gemv_knobs(spec: LinearSpec, shape: FragmentShape, rows: int, gpu: Gpu) -> GemvKnobs:
    """Warps, loads in flight, tiles a warp and buffers for M <= 16.

    Few row tiles want many warps on each; many want small blocks. Loading a batch ahead pays where
    warps are few a multiprocessor, two tiles a warp halve the reads of x where they are many (and
    gate and up are two tiles by nature).
    """
    row_tiles = shape.tiles(spec.n)
    columns = shape.units(spec.k) * shape.unit
    few, many = row_tiles < 300, row_tiles >= 4 * gpu.multiprocessors
    tiles = 2 if spec.silu_mul or rows == 16 or (many and rows >= 4) else 1
    if rows == 1:
        warps, inflight, buffers = (16, 4, 1) if few else (16, 2, 1)
        if many:
            warps, inflight = (4, 2) if spec.silu_mul else (8, 8)
    elif rows == 2:
        warps, inflight, buffers = (16, 2, 1) if few else (8, 4, 2)
        if many:
            warps, buffers = 4 * tiles, 1
    elif rows <= 8:
        warps, inflight, buffers = (16, 1, 2) if few else (4, 2, 1) if many else (8, 2, 2)
    else:
        warps, inflight, buffers = (16, 1, 2) if few else (8 if many else 16, 1, 1)
    if rows in (1, 8) and few and columns % (14 * 256) == 0:
        warps = 14  # K = 14336 and its like: no warp idles in the last round
    while warps > 4 and shape.units(spec.k) < warps * inflight:
        warps //= 2
    knobs = GemvKnobs(warps, inflight, tiles, buffers)
    return _shared_evenly(knobs, shape, columns) if rows == 1 else knobs


def _shared_evenly(knobs: GemvKnobs, shape: FragmentShape, columns: int) -> GemvKnobs:
    """Return knobs whose warps have next to no loads without columns.

    Where K is no multiple of 256, such as 2880, the nearest ones that read at most a tenth more
    than K; those that already do stay.
    """
    if not shape.group or columns % (8 * shape.group) == 0:
        return knobs
    chunk = next(c for d in (4, 2, 1) if columns % (c := max(shape.unit, d * shape.group)) == 0)
    chunks, loads = columns // chunk, chunk // shape.unit

    def rank(warps: int, batch: int) -> tuple[bool, float, float]:
        waste = -(-chunks // (warps * batch)) * warps * batch / chunks
        flight = log2(warps * batch * loads / (knobs.warps * knobs.inflight))
        return waste > _EVEN, abs(flight), abs(log2(warps / knobs.warps))

    found = knobs.warps, max(1, knobs.inflight // loads)
    if not rank(*found)[0]:
        return knobs
    sizes = [(w, b) for w in range(4, 17) for b in range(1, 8 // (loads * knobs.tiles) + 1)]
    warps, batch = min([found, *sizes], key=lambda size: rank(*size))
    return replace(knobs, warps=warps, inflight=batch * loads)


def tile_knobs(spec: LinearSpec, gpu: Gpu, rows: int) -> TileKnobs:
    """Blocks of x, groups, ring, cluster and roles for M > 16."""
    if in_e4m3(spec) and rows >= E4M3_ROWS:
        return e4m3_knobs(spec, gpu, rows)
    depth = spec.k // TileKnobs().columns
    if not gpu.wgmma:
        return _mma_knobs(spec, gpu, rows, depth)
    row_groups = -(-spec.n // 64)
    if rows > SPLIT_ROWS:
        return TileKnobs(256, 2, 4, 1, 2, 1, True)
    if rows == WHOLE_ROWS:
        return _whole_knobs(spec, gpu, row_groups, depth)
    if rows == SPLIT_ROWS:
        blocks = -(-row_groups // 2) * 2  # of 128 rows of W and 256 of x
        if blocks * 2 <= gpu.multiprocessors and depth >= 16:
            return TileKnobs(256, 2, 4, 2, 1, 1, True)
        if blocks * 4 <= gpu.multiprocessors * 3:  # a quarter would idle: 192 rows of W by 128
            return TileKnobs(128, 3, 4)
        return TileKnobs(256, 2, 4, 1, 2, 1, True, True)
    if rows >= 64 and row_groups >= 2 * gpu.multiprocessors:
        # enough for blocks that share x among 256 rows of W; with 128 rows of x their sixteen warps
        # leave no room for a seventeenth
        return TileKnobs(rows, 4, 6, 1, 1, 2 if rows == 128 else 1, rows == 64)
    groups = {16: 7, 32: 7, 64: 4, 128: 2}[rows] * gpu.multiprocessors  # of four warps, at once
    cluster = 1
    while cluster < 8 and row_groups * cluster * 2 <= groups and depth // (cluster * 2) >= 8:
        many = row_groups * 8 > 5 * gpu.multiprocessors
        if cluster == 4 and (many or (rows > 32 and depth < 128)):
            break
        cluster *= 2
    if cluster == 1 and rows <= 32:
        row_blocks = 2 if rows == 16 else 4
    elif rows == 128:
        row_blocks = 3 if depth >= 128 else 2 if cluster == 2 else 1
    else:
        row_blocks = 2 if rows == 16 and cluster == 4 else 1
    stages = 8 if rows == 16 else 4 if rows == 128 and row_blocks != 2 else 6
    return TileKnobs(rows, row_blocks, stages, cluster, 1, 2 if rows == 64 else 1, True)


def _whole_knobs(spec: LinearSpec, gpu: Gpu, row_groups: int, depth: int) -> TileKnobs:
    """Knobs for one block of 256 rows of x: nearly as many blocks as there are multiprocessors.

    Measured on an H200 (benchmarks/results/2026-11-30-h200.md): with few rows of W blocks of 64 of
    them and K in two halves, then 192 by 128 rows of x, then whole blocks that nobody shares.
    """
    if depth >= 16 and row_groups * 2 <= gpu.multiprocessors:
        return TileKnobs(256, 1, 4, 2, 1, 1, True)
    if depth >= 16 and -(-row_groups // 3) * 4 <= gpu.multiprocessors:
        return TileKnobs(128, 3, 4, 2, 1, 1, True)
    if -(-row_groups // 2) <= 2 * gpu.multiprocessors:
        return TileKnobs(256, 2, 4, 1, 1, 1, True)
    return tile_knobs(spec, gpu, SPLIT_ROWS)


def e4m3_knobs(spec: LinearSpec, gpu: Gpu, rows: int) -> TileKnobs:
    """Knobs of products of E4M3, for more than 32 rows of x.

    Up to 64 rows blocks have 64 rows of W and half of K where that makes no more than two of them a
    multiprocessor. Where it makes no more than one, rings are so deep that two do not fit: launched
    behind their rounding kernel, blocks would else share some multiprocessors and leave others
    idle. Up to 512 rows of x K is split over two blocks where half of the multiprocessors would
    idle; otherwise blocks stay and walk over tiles. Blocks of 64 rows of W, up to 256 of x, where
    there are no more of them than multiprocessors then. Values were measured on an H200
    (benchmarks/results/2026-11-30-h200-fp8.md, 2026-12-01-h200.md).
    """
    row_groups, depth = -(-spec.n // 64), spec.k // STAGE_BYTES
    if rows <= 64 and row_groups <= gpu.multiprocessors and depth >= 8:
        alone = row_groups * 2 <= gpu.multiprocessors
        return TileKnobs(64, 1, 10 if alone else 4, 2, producer=True, e4m3=True)
    if rows <= 64:
        return TileKnobs(64, 2, 4, producer=True, e4m3=True)
    if rows <= WHOLE_ROWS and row_groups * 2 <= gpu.multiprocessors and depth >= 8:
        stages = 6 if rows < WHOLE_ROWS and depth >= 32 else 4
        return TileKnobs(rows, 1, stages, 2, producer=True, e4m3=True)
    blocks = -(-row_groups // 2) * -(-rows // WHOLE_ROWS)
    split = rows <= SPLIT_ROWS and blocks * 2 <= gpu.multiprocessors and depth >= 8
    if rows < WHOLE_ROWS:
        if row_groups >= 2 * gpu.multiprocessors:
            return TileKnobs(rows, 4, 4, e4m3=True)
        return TileKnobs(rows, 2, 4, 1 + split, producer=True, e4m3=True)
    if split:
        return TileKnobs(WHOLE_ROWS, 2, 4, 2, producer=True, e4m3=True)
    return TileKnobs(WHOLE_ROWS, 2, 4, 1, 2, 1, True, True, e4m3=True)


def _mma_knobs(spec: LinearSpec, gpu: Gpu, rows: int, depth: int) -> TileKnobs:
    """Knobs without wgmma: two groups of warps, K split where clusters exist and M is small."""
    n_tiles, cluster = -(-spec.n // 128), 1
    if gpu.clusters and rows <= SPLIT_ROWS:
        slots = gpu.multiprocessors * (1 if rows >= 128 else 2)
        most = 8 if rows <= 64 and depth >= 128 else 2 if rows >= 128 else 4
        while cluster < most and n_tiles * cluster * 2 <= slots and depth // (cluster * 2) >= 8:
            cluster *= 2
    return TileKnobs(min(rows, 128), 2, 6 if rows <= 64 else 4, cluster, wgmma=False)


def shared_bytes(knobs: TileKnobs, shape: FragmentShape) -> int:
    """Shared memory of a tile kernel."""
    rows, units = knobs.groups * 64, knobs.columns // shape.unit
    weights = knobs.groups * 4 * units * (512 + 8 * shape.record)
    ring = knobs.stages * (knobs.block_m * 128 + weights + 16)
    ring += TABLE_BYTES * knobs.e4m3
    if knobs.persistent:
        ring += knobs.groups * SCRATCH_BYTES
    return max(ring, knobs.block_m * (rows + 4) * 4) + 1040


def fit(knobs: TileKnobs, shape: FragmentShape, gpu: Gpu) -> TileKnobs:
    """Shrink the ring, then the block, until the kernel fits the architecture's shared memory."""
    while shared_bytes(knobs, shape) > gpu.shared_bytes:
        if knobs.stages > (3 if knobs.persistent else 4):
            knobs = replace(knobs, stages=knobs.stages - (1 if knobs.persistent else 2))
        else:
            knobs = replace(knobs, block_m=knobs.block_m // 2)
    return knobs


def default_buckets(spec: LinearSpec, shape: FragmentShape, gpu: Gpu) -> list[Bucket]:
    """Buckets of a linear, in rising order of rows; the last takes any M.

    `spec.m` keeps the one bucket that M falls into, `spec.m_max` drops those that cannot occur.
    """
    found = [Bucket(rows, gemv_knobs(spec, shape, rows, gpu)) for rows in GEMV_ROWS]
    if gpu.wgmma and shape.tiles(spec.n) >= 300:
        found[-1] = Bucket(16, fit(tile_knobs(spec, gpu, 16), shape, gpu))
    found += [Bucket(rows, fit(tile_knobs(spec, gpu, rows), shape, gpu)) for rows in TILE_ROWS]
    one, split, whole = (
        fit(tile_knobs(spec, gpu, rows), shape, gpu)
        for rows in (WHOLE_ROWS, SPLIT_ROWS, SPLIT_ROWS + 1)
    )
    if one != split:
        found.append(Bucket(WHOLE_ROWS, one))
    if split != whole:
        found.append(Bucket(SPLIT_ROWS, split))
    found.append(Bucket(None, whole))
    most = spec.m if spec.m is not None else spec.m_max
    if most is not None:
        last = next(i for i, b in enumerate(found) if b.rows is None or b.rows >= most)
        found = found[last : last + 1] if spec.m is not None else found[: last + 1]
    return [*found[:-1], Bucket(None, found[-1].knobs)] if spec.m is None else found
