"""LayerNorm of rows: mean and variance in 16 lanes, in two passes over a row in the L1 cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from . import emit as e
from .activations import LANES, horizontal_sum, over_rows
from .emit import Expr


def layer_norm(k: int, m: int | None, eps: float) -> Any:
    """Build y = (x - mean) / sqrt(variance + eps) * weight + bias.

    Arguments x float32 [M, K], weight and bias [K], y [M, K].
    """
    buffers = (
        ("x", (None, k), "float32"),
        ("weight", (k,), "float32"),
        ("bias", (k,), "float32"),
        ("y", (None, k), "float32"),
    )
    with e.function("layer_norm", buffers, m) as (b, rows):

        def body(row: Expr) -> None:
            mean = _mean(b["x"], row, k, lambda x, _lanes: x)
            variance = _mean(b["x"], row, k, lambda x, lanes: _square(x - e.splat(mean, lanes)))
            one = e.const(1.0, "float32")
            inverse = e.let(one / tirx.sqrt(variance + e.const(eps, "float32")))

            def store(column: Expr, lanes: int) -> None:
                x = e.load(b["x"], row, column, lanes=lanes) - e.splat(mean, lanes)
                weight = e.load(b["weight"], column, lanes=lanes)
                y = x * e.splat(inverse, lanes) * weight + e.load(b["bias"], column, lanes=lanes)
                e.store(b["y"], y, row, column, lanes=lanes)

            _columns(k, store)

        over_rows(rows, k, body)
    return b["func"]


def _square(x: Expr) -> Expr:
    x = e.let(x)
    return x * x


def _mean(x: Any, row: Expr, k: int, of: Callable[[Expr, int], Expr]) -> Expr:
    """Average a function of a row's values."""
    wide = e.Register("float32", LANES, e.const(0.0, "float32", LANES))
    single = e.Register("float32", 1, e.const(0.0, "float32"))

    def add(column: Expr, lanes: int) -> None:
        sums = wide if lanes == LANES else single
        sums.set(sums.get() + of(e.load(x, row, column, lanes=lanes), lanes))

    _columns(k, add)
    total = single.get() + horizontal_sum(wide.get(), LANES)
    return e.let(total * e.const(1.0 / k, "float32"))


def _columns(k: int, body: Callable[[Expr, int], None]) -> None:
    """Run ``body(column, lanes)`` over all columns, 16 at a time and the rest one by one."""
    if k // LANES:
        with e.serial(0, k // LANES) as i:
            body(e.let(i * LANES), LANES)
    for column in range(k // LANES * LANES, k):
        body(e.const(column), 1)
