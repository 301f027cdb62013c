"""What happens to a finished sum: tensor scale, bias, silu * up, residual, rounding to float16."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from relax_passes.spec import TILE_ROWS

from ..intrinsics.arithmetic import CLAMPED_GATE, SILU
from .buffers import Linear


def finish(linear: Linear, value: tirx.Expr, row: tirx.Expr, factor: float) -> tirx.Expr:
    """Scale a sum of packed row `row` of W and add its bias; float32."""
    if factor != 1.0:
        value = value * tirx.const(factor, "float32")
    if linear.tile_scale is not None:
        tile = tirx.min(row // TILE_ROWS, linear.tiles - 1)
        value = value * linear.tile_scale[linear.tile(tile)]
    if linear.bias is not None:
        # rows beyond N are computed and dropped; the read must stay inside
        inside = tirx.min(row, linear.spec.n - 1)
        if not linear.spec.joined or linear.chosen is None:
            return value + linear.bias[linear.feature(inside)]
        for j in range(linear.spec.chosen):
            bias = linear.bias[linear.chosen.expert(j) * linear.spec.n + inside]
            value = value + linear.chosen.share(j) * bias
    return value


def gated(linear: Linear, gate: tirx.Expr, up: tirx.Expr) -> tirx.Expr:
    """silu(gate) * up in float32, or what the linear has in its place."""
    spec = linear.spec
    if spec.gate_alpha:
        return CLAMPED_GATE(gate, up, spec.gate_alpha, spec.gate_limit)
    return SILU(gate) * up


def store(linear: Linear, row: tirx.Expr, column: tirx.Expr, value: tirx.Expr) -> None:
    """Add the residual and write y at a row of the block; the caller checks it, this the column."""

    def write() -> None:
        total, place = value, linear.y_row(row)
        if linear.chosen is not None and not linear.spec.joined:
            total = total * linear.chosen.share(place)
        if linear.residual is not None:
            total = total + tirx.Cast("float32", linear.residual[place, column])
        T.buffer_store(linear.y, tirx.Cast("float16", total), [place, column])

    with T.If(column < linear.spec.out_features):
        with T.Then():
            write()
