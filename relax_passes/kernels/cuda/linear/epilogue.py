"""What happens to a finished sum: tensor scale, bias, silu * up, residual, rounding to float16."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from relax_passes.spec import TILE_ROWS

from ..intrinsics.arithmetic import SILU
from .buffers import Linear


def finish(linear: Linear, value: tirx.Expr, row: tirx.Expr, factor: float) -> tirx.Expr:
    """Scale a sum of packed row `row` of W and add its bias; float32."""
    if factor != 1.0:
        value = value * tirx.const(factor, "float32")
    if linear.tile_scale is not None:
        value = value * linear.tile_scale[tirx.min(row // TILE_ROWS, linear.tiles - 1)]
    if linear.bias is not None:
        # rows beyond N are computed and dropped; the read must stay inside
        value = value + linear.bias[tirx.min(row, linear.spec.n - 1)]
    return value


def gated(gate: tirx.Expr, up: tirx.Expr) -> tirx.Expr:
    """silu(gate) * up in float32."""
    return SILU(gate) * up


def store(linear: Linear, row: tirx.Expr, column: tirx.Expr, value: tirx.Expr) -> None:
    """Add the residual and write y[row, column]; the caller checks the row, this the column."""

    def write() -> None:
        total = value
        if linear.residual is not None:
            total = total + tirx.Cast("float32", linear.residual[row, column])
        T.buffer_store(linear.y, tirx.Cast("float16", total), [row, column])

    with T.If(column < linear.spec.out_features):
        with T.Then():
            write()
