"""What happens to activations between linears: RMSNorm, silu(gate) * up, quantization to int8.

One row of x is one pass: a prologue (nothing, RMSNorm or silu * up) feeds 32 columns at a time to
the quantizer, so a normalized row is never stored as float32.  Rows run in parallel when there are
enough of them; a single row is serial, since waking a second thread takes longer than the row.

    codes int8 [M, Kp], scales float32 [M, Kp/32] = max|x| / 127, sums int32 [M, Kp/32]
    code = round half to even of x / scale (true division); an all-zero group has scale 0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from ..spec import GROUP
from . import emit as e
from .emit import Expr
from .math import silu

LANES = 16
PARALLEL_ROWS = 8  # fewer rows than this stay on one thread
PROLOGUES = {"none": ("x",), "rms_norm": ("x", "weight"), "silu_mul": ("gate", "up")}


def over_rows(m: Expr, body: Callable[[Expr], None]) -> None:
    """Run ``body(row)`` for all rows, in parallel when there are many."""
    if isinstance(m, tirx.IntImm):
        loop = e.parallel if int(m) >= PARALLEL_ROWS else e.serial
        with loop(0, m) as row:
            body(row)
        return
    with e.when(m >= PARALLEL_ROWS):
        with e.then(), e.parallel(0, m) as row:
            body(row)
        with e.otherwise(), e.serial(0, m) as row:
            body(row)


def _inputs(prologue: str, k: int) -> list[tuple[str, tuple, str]]:
    if prologue not in PROLOGUES:
        raise ValueError(f"unknown prologue {prologue!r}; known: {', '.join(PROLOGUES)}")
    return [
        (name, (k,) if name == "weight" else (None, k), "float32") for name in PROLOGUES[prologue]
    ]


class Prologue:
    """Produces the values of a row, 16 columns at a time."""

    def __init__(self, kind: str, buffers: dict[str, Any], k: int, eps: float, row: Expr):
        self.kind, self.buffers, self.k, self.row = kind, buffers, k, row
        self.inverse = self._inverse_rms(eps) if kind == "rms_norm" else None

    def at(self, column: Expr, lanes: int = LANES) -> Expr:
        """Return the values of ``lanes`` columns."""
        b, row = self.buffers, self.row
        if self.kind == "silu_mul":
            gate = e.load(b["gate"], row, column, lanes=lanes)
            return e.let(silu(gate, lanes) * e.load(b["up"], row, column, lanes=lanes))
        x = e.load(b["x"], row, column, lanes=lanes)
        if self.kind == "rms_norm":
            weight = e.load(b["weight"], column, lanes=lanes)
            x = x * e.splat(self.inverse, lanes) * weight
        return e.let(x)

    def _inverse_rms(self, eps: float) -> Expr:
        """1 / sqrt(mean of squares + eps), summed in 64 float32 lanes."""
        x, row, k = self.buffers["x"], self.row, self.k
        zero = e.const(0.0, "float32", LANES)
        sums = [e.Register("float32", LANES, zero) for _ in range(4)]
        wide = 4 * LANES
        if k // wide:
            with e.serial(0, k // wide) as i:
                for j, register in enumerate(sums):
                    v = e.let(e.load(x, row, i * wide + j * LANES, lanes=LANES))
                    register.set(e.fma(v, v, register.get(), LANES))
        done = k // wide * wide
        for column in range(done, k // LANES * LANES, LANES):
            v = e.let(e.load(x, row, column, lanes=LANES))
            sums[0].set(e.fma(v, v, sums[0].get(), LANES))
        total = e.Register("float32", 1)
        lanes = e.let((sums[0].get() + sums[1].get()) + (sums[2].get() + sums[3].get()))
        total.set(horizontal_sum(lanes, LANES))
        for column in range(k // LANES * LANES, k):
            v = e.let(e.load(x, row, column))
            total.set(total.get() + v * v)
        mean = total.get() * e.const(1.0 / k, "float32")
        return e.let(e.const(1.0, "float32") / tirx.sqrt(mean + e.const(eps, "float32")))


def horizontal_sum(value: Expr, lanes: int) -> Expr:
    """Add the float32 lanes of a vector pairwise (halves, then halves of that)."""
    while lanes > 1:
        lanes //= 2
        low = [tirx.const(i, "int32") for i in range(lanes)]
        high = [tirx.const(lanes + i, "int32") for i in range(lanes)]
        value = e.let(value)
        value = e.let(tirx.Shuffle([value], low) + tirx.Shuffle([value], high))
    return value


def rms_norm(k: int, m: int | None = None, eps: float = 1e-5) -> Any:
    """Build y = x / sqrt(mean(x^2) + eps) * weight; arguments x [M, K], weight [K], y [M, K]."""
    return _map_rows("rms_norm", k, m, eps)


def silu_mul(k: int, m: int | None = None) -> Any:
    """Build y = silu(gate) * up; arguments gate [M, K], up [M, K], y [M, K]."""
    return _map_rows("silu_mul", k, m, 0.0)


def _map_rows(kind: str, k: int, m: int | None, eps: float) -> Any:
    arguments = [*_inputs(kind, k), ("y", (None, k), "float32")]
    with e.function(kind, arguments, m) as (buffers, rows):

        def body(row: Expr) -> None:
            values = Prologue(kind, buffers, k, eps, row)
            if k // LANES:
                with e.serial(0, k // LANES) as i:
                    e.store(buffers["y"], values.at(i * LANES), row, i * LANES, lanes=LANES)
            for column in range(k // LANES * LANES, k):
                e.store(buffers["y"], values.at(e.const(column), 1), row, column)

        over_rows(rows, body)
    return buffers["func"]


def quantize_int8(
    k: int, m: int | None = None, sums: bool = False, prologue: str = "none", eps: float = 0.0
) -> Any:
    """Build the quantization of activations to int8, optionally behind RMSNorm or silu * up.

    Parameters
    ----------
    k : int
        Columns of x; codes are padded with zeros to whole groups of 32.
    m : int or None
        Rows, None for any.
    sums : bool
        Also store the sum of each group's codes (formats with an offset need it).
    prologue : str
        "none" (x), "rms_norm" (x, weight) or "silu_mul" (gate, up).
    eps : float
        RMSNorm's epsilon.

    Returns
    -------
    tvm.tirx.PrimFunc
        Arguments: the prologue's inputs (float32), codes, scales, [sums].
    """
    groups = -(-k // GROUP)
    arguments = [
        *_inputs(prologue, k),
        ("codes", (None, groups * GROUP), "int8"),
        ("scales", (None, groups), "float32"),
        *([("sums", (None, groups), "int32")] if sums else []),
    ]
    name = "quantize_int8" if prologue == "none" else f"{prologue}_quantize_int8"
    with e.function(name, arguments, m) as (buffers, rows):

        def body(row: Expr) -> None:
            values = Prologue(prologue, buffers, k, eps, row)
            whole = k // GROUP
            if whole:
                with e.serial(0, whole) as group:
                    pair = [values.at(group * GROUP + j * LANES) for j in range(2)]
                    _store_group(buffers, row, group, pair)
            if k % GROUP:
                padded = e.scratch(GROUP, "float32")
                e.store(padded, e.const(0.0, "float32", GROUP), 0, lanes=GROUP)
                for i in range(k % GROUP):
                    e.store(padded, values.at(e.const(whole * GROUP + i), 1), i)
                pair = [e.let(e.load(padded, j * LANES, lanes=LANES)) for j in range(2)]
                _store_group(buffers, row, e.const(whole), pair)

        over_rows(rows, body)
    return buffers["func"]


def largest_magnitude(values: list[Expr]) -> Expr:
    """Largest |x| of some vectors; magnitudes compare like their bits, NaN being largest."""
    mask = e.const(0x7FFFFFFF, "int32", LANES)
    best = None
    for v in values:
        magnitude = e.bits(v, "int32", LANES) & mask
        best = e.let(magnitude if best is None else tirx.max(best, magnitude))
    return e.let(e.bits(e.llvm("int32", "llvm.vector.reduce.smax", best), "float32"))


def _store_group(buffers: dict[str, Any], row: Expr, group: Expr, values: list[Expr]) -> None:
    scale = e.let(largest_magnitude(values) / e.const(127.0, "float32"))
    zero, one = e.const(0.0, "float32"), e.const(1.0, "float32")
    divisor = e.let(e.splat(tirx.Select(scale == zero, one, scale), LANES))
    limit = e.const(127.0, "float32", LANES)
    total = e.const(0, "int32", LANES)
    e.store(buffers["scales"], scale, row, group)
    for j, v in enumerate(values):
        code = e.llvm(f"float32x{LANES}", "llvm.rint", v / divisor)
        # A subnormal scale is inexact, and its quotients may pass 127.
        code = tirx.max(tirx.min(code, limit), e.const(-127.0, "float32", LANES))
        code = e.let(e.cast(code, "int32", LANES))
        at = group * GROUP + j * LANES
        e.store(buffers["codes"], e.cast(code, "int8", LANES), row, at, lanes=LANES)
        total = total + code
    if "sums" in buffers:
        e.store(
            buffers["sums"], e.llvm("int32", "llvm.vector.reduce.add", e.let(total)), row, group
        )
