"""LoRA adapters on CPUs: each row's products with its A and B, as `relax_passes.adapters` has them.

What is read of a step of few rows is the adapters themselves, once for each row: neighbouring
lanes are rows of A or of W, and a value of x is repeated in all of them. Several sums run beside
each other, since one alone would wait for its own additions.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from relax_passes.adapters import LANES, Parts

from . import emit as e
from .emit import Expr
from .math import silu

SUMS = 8  # beside each other in a product with A
CHAINS = 4  # and in one with B
BLOCK = 16  # tiles of W's rows that a thread takes at a time
AHEAD = 2048  # bytes of an adapter between what is read and what is asked for
LINE = 64  # bytes


def down(parts: Parts, k: int, count: int, dtype: str) -> Any:
    """Build t = x A^T; arguments x [M, K], slots int32 [M], A, t [M, tiles * 16]."""
    tiles = parts.down_tiles
    arguments = [
        ("x", (None, k), "float32"),
        ("slots", (None,), "int32"),
        ("w_down", parts.down_shape(count, k), dtype),
        ("t", (None, tiles * LANES), "float32"),
    ]
    with e.function("adapter_down", arguments, None) as (b, m):
        with e.parallel(0, m * tiles) as item:
            row, tile = e.let(item // tiles), e.let(item % tiles)
            slot = e.let(e.load(b["slots"], row))
            with e.when(slot >= 0), e.then():
                zero = e.const(0.0, "float32", LANES)
                sums = [e.Register("float32", LANES, zero) for _ in range(min(SUMS, k))]

                def add(register: e.Register, column: Expr) -> None:
                    x = e.splat(e.load(b["x"], row, column), LANES)
                    a = _wide(e.load(b["w_down"], slot, tile, column, 0, lanes=LANES), dtype)
                    register.set(e.fma(x, a, register.get(), LANES))

                with e.serial(0, k // len(sums)) as i:
                    _ask(b["w_down"], dtype, len(sums), slot, tile, i * len(sums))
                    for j, register in enumerate(sums):
                        add(register, i * len(sums) + j)
                for column in range(k // len(sums) * len(sums), k):
                    add(sums[0], e.const(column))
                e.store(b["t"], _added(sums), row, tile * LANES, lanes=LANES)
    return b["func"]


def up(parts: Parts, count: int, dtype: str, gated: bool) -> Any:
    """Build z = y + t B^T, or silu(gate) * up of that; arguments y [M, N], t, slots, B, z."""
    n = parts.n // 2 if gated else parts.n
    arguments = [
        ("y", (None, parts.n), "float32"),
        ("t", (None, parts.down_tiles * LANES), "float32"),
        ("slots", (None,), "int32"),
        ("w_up", parts.up_shape(count), dtype),
        ("z", (None, n), "float32"),
    ]
    outputs = -(-n // LANES)  # tiles of z, of which each takes two of y's where it is gated
    blocks = -(-outputs // BLOCK)
    with e.function("adapter_up", arguments, None) as (b, m):
        kernel = _Up(parts, b, dtype, gated)
        with e.parallel(0, m * blocks) as item:
            row, block = e.let(item // blocks), e.let(item % blocks)
            slot = e.let(e.load(b["slots"], row))
            end = e.let(tirx.min(e.const(BLOCK), n // LANES - block * BLOCK))
            with e.serial(0, tirx.max(end, e.const(0))) as i:
                kernel.tile(row, slot, e.let(block * BLOCK + i), LANES)
            if n % LANES:
                with e.when(block == blocks - 1), e.then():
                    kernel.tile(row, slot, e.const(n // LANES), n % LANES)
    return b["func"]


class _Up:
    """Emits one tile of the result."""

    def __init__(self, parts: Parts, buffers: dict[str, Any], dtype: str, gated: bool) -> None:
        self.parts, self.buffers, self.dtype, self.gated = parts, buffers, dtype, gated

    def tile(self, row: Expr, slot: Expr, tile: Expr, columns: int) -> None:
        """Emit a tile of ``columns``: all lanes, or fewer at the end."""
        if self.gated:
            values = [self._sum(row, slot, e.let(2 * tile + half), LANES) for half in (0, 1)]
            value = e.let(silu(values[0], LANES) * values[1])
        else:
            value = self._sum(row, slot, tile, columns)
        if columns == LANES:
            e.store(self.buffers["z"], value, row, tile * LANES, lanes=LANES)
            return
        for i in range(columns):
            one = tirx.Shuffle([value], [tirx.const(i, "int32")])
            e.store(self.buffers["z"], one, row, tile * LANES + i)

    def _sum(self, row: Expr, slot: Expr, tile: Expr, columns: int) -> Expr:
        """Return a tile of y and of the products with B."""
        sums = [e.Register("float32", LANES, self._y(row, tile, columns))]
        with e.when(slot >= 0), e.then():
            first, width = self._first(tile), self.parts.width
            _ask(self.buffers["w_up"], self.dtype, width, slot, tile, e.const(0))
            zero = e.const(0.0, "float32", LANES)
            own = [e.Register("float32", LANES, zero) for _ in range(min(CHAINS, width))]

            def add(register: e.Register, j: Expr) -> None:
                t = e.splat(e.load(self.buffers["t"], row, first + j), LANES)
                b = e.load(self.buffers["w_up"], slot, tile, j, 0, lanes=LANES)
                register.set(e.fma(t, _wide(b, self.dtype), register.get(), LANES))

            with e.serial(0, width // len(own)) as i:
                for j, register in enumerate(own):
                    add(register, i * len(own) + j)
            for j in range(width // len(own) * len(own), width):
                add(own[0], e.const(j))
            sums[0].set(sums[0].get() + _added(own))
        return e.let(sums[0].get())

    def _y(self, row: Expr, tile: Expr, columns: int) -> Expr:
        if columns == LANES:
            return e.load(self.buffers["y"], row, tile * LANES, lanes=LANES)
        padded = e.scratch(LANES, "float32")
        e.store(padded, e.const(0.0, "float32", LANES), 0, lanes=LANES)
        for i in range(columns):
            e.store(padded, e.load(self.buffers["y"], row, tile * LANES + i), i)
        return e.load(padded, 0, lanes=LANES)

    def _first(self, tile: Expr) -> Expr:
        """Return the first product with A that a tile reads."""
        parts = self.parts
        if not parts.apart:
            return e.const(0)
        if parts.interleaved:
            return e.let(tile % len(parts.sizes) * parts.rank)
        first: Expr = e.const(0)
        for start in parts.starts():
            first = first + tirx.Select(tile >= start, e.const(parts.rank), e.const(0))
        return e.let(first)


def _ask(buffer: Any, dtype: str, rows: int, slot: Expr, tile: Expr, row: Expr) -> None:
    """Ask for as many rows of lanes as are read now, further on.

    A thread reads 64 KiB at one place, then at another: what the hardware foresees is too little.
    """
    each = LANES * (4 if dtype == "float32" else 2)
    for line in range(-(-rows * each // LINE)):
        e.prefetch(buffer, slot, tile, row + (AHEAD + line * LINE) // each, e.const(0))


def _wide(value: Expr, dtype: str) -> Expr:
    return value if dtype == "float32" else e.let(e.cast(value, "float32", LANES))


def _added(registers: list[e.Register]) -> Expr:
    values = [register.get() for register in registers]
    while len(values) > 1:
        pairs = [a + b for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + ([values[-1]] if len(values) % 2 else [])
    return e.let(values[0])
