"""Rows of a packed table as float16: the embedding lookup, from the layout that the head reads.

A row of layout "cuda-fragment" lies in one tile, its numbers in all four lanes of a group of eight
rows (amx_tvm/formats/cuda_layout.py); a thread finds one number, since loads in a row of their own
would wait for each other. So a tied embedding and head share one copy of their weights.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from amx_tvm import formats
from amx_tvm.formats import cuda_layout
from relax_passes.kernels.element import element
from relax_passes.spec import TILE_ROWS, LinearSpec

THREADS = 256


def embedding(rows: int, k: int, format_name: str, m: int | None, bound: bool = True):  # noqa: ANN201
    """Build the lookup.

    Parameters
    ----------
    rows, k : int
        Size of the table.
    format_name : str
        Its number format.
    m : int or None
        Number of ids; None for any.
    bound : bool
        Run on a GPU's blocks and threads; without them loops run in order, for tests.

    Returns
    -------
    tvm.tirx.PrimFunc
        Arguments: ids int32 [M], codes, scales and tile_scale as the format has them, y float16
        [M, K]. An id outside the table reads row 0.
    """
    fmt, spec = formats.get(format_name), LinearSpec(format_name, rows, k)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("embedding")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            count = tirx.Var("m", "int64") if m is None else m
            ids = T.arg("ids", T.Buffer((count,), "int32"))
            table = {
                name: T.arg(name, T.Buffer(shape, dtype))
                for name, shape, dtype in spec.weight_buffers("cuda-fragment")
            }
            y = T.arg("y", T.Buffer((count, k), "float16"))
            many = tirx.const(m, "int32") if m is not None else tirx.Cast("int32", count)
            extents = (many, -(-k // THREADS), THREADS)
            names = ("blockIdx.x", "blockIdx.y", "threadIdx.x")
            if bound:
                loops = [T.thread_binding(e, n) for e, n in zip(extents, names, strict=True)]
            else:
                loops = [T.serial(extent) for extent in extents]
            with T.frame_scope(loops) as (at, piece, thread):
                with T.sblock("embedding"):
                    T.reads()
                    T.writes()
                    given = T.bind(ids[at])
                    inside = tirx.And(given >= 0, given < rows)
                    token = T.bind(tirx.Select(inside, given, tirx.const(0, "int32")))
                    column = T.bind(piece * THREADS + thread)
                    with T.If(column < k):
                        with T.Then():
                            value = _value(fmt, table, token, column)
                            T.buffer_store(y, tirx.Cast("float16", value), [at, column])
    return builder.get().without_attr("global_symbol")


def _value(fmt, table: dict, token: tirx.Expr, column: tirx.Expr) -> tirx.Expr:  # noqa: ANN001
    """Decode one number of a row."""
    shape = cuda_layout.shape_of(fmt)
    codes, scales = table["w_codes"], table["w_scales"]
    tile, row = T.bind(token // TILE_ROWS), T.bind(token % TILE_ROWS)
    unit, inside = T.bind(column // shape.unit), T.bind(column % shape.unit)
    g, h = T.bind(row % 8), T.bind(row // 8)
    step, kh, e = inside // 16, inside % 16 // 8, inside % 2
    lane = T.bind((4 * g + inside % 8 // 2) * cuda_layout.LANE_BYTES)
    i = T.bind(2 * kh + h)  # pair of registers

    def byte(place: tirx.Expr) -> tirx.Expr:
        return tirx.Cast("int32", codes[tile, unit, lane + place])

    if shape.element == "int8":
        code = byte((2 * step + kh) * 4 + 2 * h + e)
    else:
        half = T.bind(byte(4 * step + 2 * e) | byte(4 * step + 2 * e + 1) << 8)
        if shape.element == "int4":
            code = half >> cuda_layout.nibble_bit(i) & 15
        else:
            sign = half >> cuda_layout.sign_bit(i) & 1
            code = half >> cuda_layout.magnitude_bit(i) & 7 | sign << 3
    record = T.bind(g * shape.record + (inside // shape.group * 2 + h) * shape.scale_bytes)

    def stored(name: str) -> tirx.Expr:
        before = 0
        for tensor in fmt.scale_tensors:
            size = 1 if tensor.type.name.startswith("E") else 2
            if tensor.name == name:
                break
            before += size
        low = scales[tile, unit, record + before]
        if size == 1:
            return low
        high = tirx.Cast("uint16", scales[tile, unit, record + before + 1])
        return tirx.reinterpret(
            "float16", tirx.Cast("uint16", low) | high << tirx.const(8, "uint16")
        )

    value = element(fmt, T.bind(tirx.Cast("uint8", code)), stored, T.bind)
    return value * table["tile_scale"][tile] if fmt.row_scaled else value
