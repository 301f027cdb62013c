"""Rows of a packed table as float32: the embedding lookup, from the layout that the head reads.

A token's row lies in one tile: four bytes in every 64-byte vector, and its own byte(s) of scale in
every group. So a tied embedding and head share one copy of their weights.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from amx_tvm.formats import get as get_format
from relax_passes.kernels.element import element
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec

from . import emit as e
from .activations import over_rows
from .emit import Expr
from .scale_reader import ScaleReader

VECTOR = 64  # bytes of one packed vector: 16 rows of four


def embedding(rows: int, k: int, format: str, m: int | None, out_dtype: str) -> Any:  # noqa: A002
    """Build the lookup.

    Parameters
    ----------
    rows, k : int
        Size of the table.
    format : str
        Its number format, packed in layout tile16x32.
    m : int or None
        Number of ids; None for any.
    out_dtype : str
        Type of the result.

    Returns
    -------
    tvm.tirx.PrimFunc
        Arguments: ids int32 [M], the table's parts, y [M, K]. An id outside the table reads row 0.
    """
    spec = LinearSpec(format, rows, k)
    fmt = get_format(format)
    arguments = [("ids", (None,), "int32"), *spec.weight_buffers(), ("y", (None, k), out_dtype)]
    with e.function(f"embedding_{format}".replace("-", "_"), arguments, m) as (buffers, count):

        def body(at: Expr) -> None:
            given = e.let(e.load(buffers["ids"], at))
            inside = tirx.And(given >= 0, given < rows)
            token = e.let(tirx.Select(inside, given, e.const(0)))
            tile, row = e.let(token // TILE_ROWS), e.let(token % TILE_ROWS)
            with e.serial(0, k) as column:
                value = _value(spec, fmt, buffers, tile, row, column)
                if fmt.row_scaled:
                    value = value * e.load(buffers["tile_scale"], tile)
                e.store(buffers["y"], e.cast(value, out_dtype), at, column)

        over_rows(count, k, body)
    return buffers["func"]


def _value(
    spec: LinearSpec, fmt: Any, buffers: dict[str, Any], tile: Expr, row: Expr, column: Expr
) -> Expr:
    """Decode one element."""
    group, k = e.let(column // GROUP), e.let(column % GROUP)
    eight_bit = fmt.terms[0].table is None
    per_vector = 4 if eight_bit else 8
    at = (k // per_vector) * VECTOR + row * 4 + k % 4
    code = e.let(e.load(buffers["w_codes"], tile, group, at))
    if not eight_bit:
        shift = e.cast((k % 8) // 4 * 4, "uint8")
        code = e.let((code >> shift) & e.const(15, "uint8"))
    sub = k // fmt.group_size if fmt.group_size < GROUP else e.const(0)
    reader = ScaleReader(fmt, buffers["w_scales"])
    return element(fmt, code, lambda name: reader.element(name, tile, group, sub, row), e.let)
