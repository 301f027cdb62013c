"""The loops around a kernel: row tiles of W (of all experts), and M rows of x in fixed blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec

from .epilogue import Kept


@dataclass(frozen=True)
class Part:
    """What one iteration of the parallel loop computes: a tile (or pair) for some rows of x.

    Attributes
    ----------
    tile : Expr
        The tile of the output.
    base : Expr or int
        The expert's first tile in the weight buffers; 0 where there are no experts.
    expert : Expr or None
        Which expert.
    first, count : Expr or int
        The rows of x.
    """

    tile: Expr
    base: Expr
    expert: Expr | None
    first: Expr
    count: Expr


@contextmanager
def each_tile(spec: LinearSpec, buffers: Any, m: Expr, span: int = 1) -> Iterator[Part]:
    """Open the parallel loop over tiles (pairs with ``span`` 2) of W, and of every expert.

    Experts are the inner index: threads take consecutive iterations, and few experts have rows.
    """
    tiles = -(-spec.tiles // span)
    if not spec.experts:
        with e.parallel(0, tiles) as t:
            yield Part(t, 0, None, 0, m)
        return
    with e.parallel(0, tiles * spec.experts) as i:
        tile = e.let(tirx.truncdiv(i, tirx.const(spec.experts, "int32")))
        expert = e.let(i - tile * spec.experts)
        first = e.let(e.load(buffers["bounds"], expert))
        count = e.let(e.load(buffers["bounds"], expert + 1) - first)
        yield Part(tile, e.let(expert * spec.tiles), expert, first, count)


def row_blocks(m: Expr, sizes: Sequence[int], body: Callable[[Expr, int], None]) -> None:
    """Run ``body(first row, rows)`` over M rows: big blocks first, then smaller ones to the end."""
    if isinstance(m, tirx.IntImm):
        done, total = 0, int(m)
        for size in sizes:
            count = (total - done) // size
            if count:
                first = done
                with e.serial(0, count) as i:
                    body(first + i * size, size)
                done += count * size
        return
    done = tirx.const(0, "int32")
    for i, size in enumerate(sizes):
        start, left = done, m - done
        count = e.let(tirx.truncdiv(left, tirx.const(size, "int32")))
        single = i > 0 and sizes[i - 1] == 2 * size  # then at most one block of this size is left
        if single:
            with e.when(count > 0), e.then():
                body(start, size)
        else:
            with e.serial(0, count) as block:
                body(start + block * size, size)
        done = e.let(start + count * size)


def equal_blocks(m: Expr, size: int, body: Callable[[Expr, int], None]) -> None:
    """Run ``body(first row, size)`` over M >= size rows in blocks of one size.

    The last block ends at M and may repeat rows of the one before it: cheaper than smaller blocks,
    in time and in code. The body must only write what depends on its rows.
    """
    count = tirx.floordiv(m + (size - 1), tirx.const(size, "int32"))
    with e.serial(0, count) as block:
        body(tirx.min(block * size, m - size), size)


def either(
    m: Expr, spec: LinearSpec, threshold: int, few: Callable[[], None], many: Callable[[], None]
) -> None:
    """Run ``many()`` when M reaches the threshold, ``few()`` below it.

    Only what can happen is emitted: one of the two for a static M or a small ``m_max``.
    """
    if isinstance(m, tirx.IntImm):
        (many if int(m) >= threshold else few)()
    elif spec.m_max is not None and spec.m_max < threshold:
        few()
    else:
        with e.when(m >= threshold):
            with e.then():
                many()
            with e.otherwise():
                few()


def tile_pair(
    spec: LinearSpec, kernel: Any, part: Part, row: Expr, rows: int, kept: Kept | None = None
) -> None:
    """Emit product and epilogue of tile t, or of the tiles 2t and 2t + 1 of silu * up.

    The pair is a loop, not two copies: lowering time grows with the text. Its sums wait on the
    stack for the epilogue. ``kept`` takes the pair's values instead of y.
    """
    t = part.tile
    if part.expert is None and kept is None:
        kernel.epilogue.expect(t, row, rows)
    if not spec.silu_mul:
        sums = kernel.product(t + part.base, row, rows)
        kernel.epilogue.rows([[[p.get() for p in r] for r in sums]], t, row)
        return
    lanes, parts = kernel.isa.rows, kernel.isa.parts
    both = e.scratch_rows(rows, 2 * TILE_ROWS)
    with e.serial(0, 2) as s:
        for r, registers in enumerate(kernel.product(t * 2 + s + part.base, row, rows)):
            for p, register in enumerate(registers):
                e.store(both[r], register.get(), s * TILE_ROWS + p * lanes, lanes=lanes)
    pairs = [
        [
            [e.load(buffer, s * TILE_ROWS + p * lanes, lanes=lanes) for p in range(parts)]
            for buffer in both
        ]
        for s in range(2)
    ]
    kernel.epilogue.rows(pairs, t, row, kept)


def tile_group(spec: LinearSpec, kernel: Any, part: Part, row: Expr, rows: int, to: Any) -> None:
    """Emit the pairs of tiles that make one group of 32 columns, for ``to`` to quantize."""
    values = e.scratch_rows(rows, GROUP)
    count = GROUP // TILE_ROWS
    with e.serial(0, count) as i:
        kept = Kept(values, i * TILE_ROWS)
        tile_pair(spec, kernel, replace(part, tile=e.let(part.tile * count + i)), row, rows, kept)
    for r, own in enumerate(values):
        both = [e.let(e.load(own, i * TILE_ROWS, lanes=TILE_ROWS)) for i in range(count)]
        to.group(e.let(row + r), part.tile, both)
