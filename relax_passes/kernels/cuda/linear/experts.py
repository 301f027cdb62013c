"""Linears of a mixture of experts: which block has which expert, and kernels by the rows of each.

Rows of x are sorted by expert, `bounds` says where each one's begin. Of every expert so many rows
are an *item*; a block finds the expert and the rows of its item itself, so nothing is copied to the
host and a step's graph holds for any choice. There are launched as many items as rows could be
spread over; those that are too many end at once. An expert without rows is not read.

Of one row a kernel may choose the experts itself, from their scores. The second product of such a
row sums over them: their weights are columns behind each other. Its weights are on their way while
the first one still runs, which therefore lets nothing begin before all scores are there.

Which schedule a number of rows gets follows from the rows that an expert has on average, with room
for twice as many and more: an item holds all rows of most experts, whose weights are read once.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from amx_tvm import formats
from amx_tvm.formats import cuda_layout
from amx_tvm.formats.cuda_layout import FragmentShape
from amx_tvm.targets.cuda.gpus import Gpu
from relax_passes.spec import LinearSpec

from ..experts.text import CHOOSE, ITEM, LEAVE, LISTED
from ..intrinsics.base import at, local
from ..intrinsics.sync import LAUNCH_DEPENDENTS, WAIT_PREREQUISITES
from .buckets import Bucket, fit, gemv_knobs
from .buffers import Chosen, Linear
from .gemv_plan import GemvKnobs
from .tile_plan import TileKnobs

# Rows of an item, and up to how many rows an expert has on average it is taken.
# On an H200 eight rows read gpt-oss-20b's experts at 4.0 TB/s and sixteen, which want every weight
# scaled, at 2.1: up to 12 rows of an expert, two items of eight take no longer than one of sixteen.
FEW = ((4, 1.0), (8, 12.0))
_REGISTERS = 65536  # of a multiprocessor
MANY = ((32, 20.0), (64, 44.0), (128, 100.0), (256, None))


def items(linear: Linear, rows: int) -> tirx.Expr | int:
    """Return the most items of so many rows each."""
    spec, m = linear.spec, linear.m
    if spec.joined:
        return 1
    if rows == 1:
        return m
    if isinstance(m, int):
        return m // rows + min(m, spec.experts)
    return tirx.truncdiv(m, tirx.const(rows, "int32")) + tirx.min(m, spec.experts)


def take(linear: Linear, item: tirx.Expr, rows: int, lane: tirx.Expr, dependent: bool) -> Linear:
    """Return the linear of a block's item, from its first row on; without an item the block ends.

    Where the kernel may begin before the one in front has ended, this waits for it.
    """
    if dependent:
        LAUNCH_DEPENDENTS()
        WAIT_PREREQUISITES()
    assert linear.bounds is not None
    found = local(3, "int32")
    if linear.spec.listed:
        LISTED(at(found, 0), at(linear.bounds, 0), item)
    else:
        ITEM[linear.spec.experts, rows](at(found, 0), at(linear.bounds, 0), item, lane)
        LEAVE(found[0] < 0)
    expert, first, end = (found[i] for i in range(3))
    return replace(linear, expert=expert, first=first, m=1 if rows == 1 else end - first)


def joins(format_name: str, k: int) -> bool:
    """Whether a kernel can sum over experts as if their columns lay behind each other."""
    fmt = None if format_name in ("none", "float16") else formats.get(format_name)
    whole = k % cuda_layout.shape_of(fmt).unit == 0
    return whole and (fmt is None or not fmt.row_scaled)


def noted_floats(spec: LinearSpec) -> int:
    """Floats of shared memory in which `choose` leaves what it found."""
    return 2 * spec.chosen


def choose(
    linear: Linear,
    item: tirx.Expr,
    shared: tirx.Buffer,
    place: int,
    tid: tirx.Expr,
    knobs: GemvKnobs,
) -> Linear:
    """Return the linear of a block that has chosen the experts of the only row.

    Where the kernel may begin before the one in front has ended, the first product waits for it;
    that one has waited for the scores, so the second product does not need to.
    """
    spec = linear.spec
    if knobs.dependent and not spec.joined:
        WAIT_PREREQUISITES()
        LAUNCH_DEPENDENTS()
    assert linear.bounds is not None
    find = CHOOSE[spec.experts, spec.chosen, spec.over_all]
    find(at(shared, place), at(linear.bounds, 0), tid)
    chosen = Chosen(shared, place, spec.chosen)
    if spec.joined:
        return replace(linear, chosen=chosen, m=1)
    return replace(linear, chosen=chosen, expert=T.bind(chosen.expert(item)), first=item, m=1)


def expert_buckets(spec: LinearSpec, shape: FragmentShape, gpu: Gpu) -> list[Bucket]:
    """Return the kernels of a linear, in rising order of rows of x of all experts."""

    def few(rows: int, most: int | None, busy: int) -> Bucket:
        # as if the weights of all experts with rows were one
        knobs = gemv_knobs(replace(spec, n=spec.n * busy), shape, rows, gpu)
        return Bucket(most, knobs, rows)

    if spec.joined:
        joined = replace(spec, k=spec.k * spec.chosen)
        return [Bucket(None, _one_row_knobs(joined, shape, gpu, 1), 1)]
    if spec.listed or spec.chosen:
        busy = spec.m or spec.experts
        return [Bucket(None, _one_row_knobs(spec, shape, gpu, busy), 1)]
    found = [few(rows, int(mean * spec.experts), spec.experts) for rows, mean in FEW]
    for rows, mean in MANY:
        knobs = fit(_tile_knobs(spec, gpu, rows), shape, gpu)
        most = None if mean is None else int(mean * spec.experts)
        if not found or found[-1].rows != most:
            found.append(Bucket(most, knobs, knobs.block_m))
    if spec.m is not None:
        chosen = next(b for b in found if b.rows is None or b.rows >= spec.m)
        return [Bucket(None, chosen.knobs, chosen.item)]
    return found


def _one_row_knobs(spec: LinearSpec, shape: FragmentShape, gpu: Gpu, busy: int) -> GemvKnobs:
    """Return knobs for rows that are an expert's alone.

    Where blocks are few for the GPU, all of K is requested in as few rounds as eight loads a lane
    allow, by warps that leave next to none of their loads without columns. Blocks of a second
    product are resident all at once: what waits for others to end waits for memory once more. First
    products, of more blocks, were slower with the fewer warps that this takes.
    """
    knobs = gemv_knobs(replace(spec, n=spec.n * busy), shape, 1, gpu)
    blocks = shape.tiles(spec.n) * busy // knobs.tiles
    columns = shape.units(spec.k) * shape.unit
    alone = blocks <= 2 * gpu.multiprocessors  # few share a multiprocessor
    most = 32768 if alone else 4096
    if blocks >= 8 * gpu.multiprocessors or columns > most or not shape.group:
        return knobs
    best: tuple = ()
    for diagonal in (8, 4, 2, 1):
        chunk = max(shape.unit, diagonal * shape.group)
        if columns % chunk:
            continue
        chunks, loads = columns // chunk, chunk // shape.unit
        used = 32 * 96  # registers, about, of a warp
        for batch in range(1, max(1, 8 // (loads * knobs.tiles)) + 1):
            for warps in range(2, 17 if alone else 9):
                rounds = -(-chunks // (warps * batch))
                waste = rounds * warps * batch / chunks
                resident = _REGISTERS // (used * warps) * gpu.multiprocessors
                waves = -(-blocks // max(1, resident)) if spec.joined else 1
                rank = (waste > 1.1, waves, rounds, waste, warps)
                if not best or rank < best[0]:
                    best = (rank, warps, batch * loads, diagonal)
        break
    _, warps, inflight, diagonal = best
    return replace(knobs, warps=warps, inflight=inflight, buffers=1, diagonal=diagonal)


def _tile_knobs(spec: LinearSpec, gpu: Gpu, rows: int) -> TileKnobs:
    if spec.gathered or not gpu.wgmma:
        return TileKnobs(min(rows, 128), 2, 6 if rows <= 64 else 4, wgmma=False)
    if rows == 256:
        return TileKnobs(256, 2, 4, producer=True)
    return TileKnobs(rows, 4 if rows <= 64 else 2, 6 if rows <= 64 else 4, producer=True)
