"""A mixture's routing as TensorIR functions; the CUDA text of their blocks is in ``text``.

    scores   x float16 [m, K], weight float32 [E, K], [bias float32 [E]] -> float32 [m, E]
    route    scores -> ids int32, shares float32 [m, chosen]
    group    ids -> source, place int32 [m, chosen], bounds int32 [E + 1]
    combine  y float16 [slots, N], shares, [place], [residual [m, N]] -> float16 [m, N]

Slot s of the order by expert holds row ``source[s]`` (one list of m * chosen numbers); ``place[t,
j]`` is the slot of row t's j-th expert, ``bounds`` the first slot of each expert and the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from relax_passes.kernels.cuda.intrinsics.base import at
from relax_passes.kernels.cuda.intrinsics.sync import LAUNCH_DEPENDENTS, WAIT_PREREQUISITES

from . import text

MOST_CHOSEN = 32  # a lane keeps one
MOST_EXPERTS = 1024
_DEPENDENT = "tirx.use_programtic_dependent_launch"  # TVM 0.27's own spelling
_OPAQUE = 8  # pattern: fused with nothing


def _kernel(
    name: str, arguments: Sequence[tuple[str, tuple, str]], dependent: bool, emit: Callable
) -> tirx.PrimFunc:
    """Build a function; ``emit`` gets buffers by name and the rows, and opens its own threads."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            attrs: dict = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": _OPAQUE}
            if dependent:
                attrs["tirx.kernel_launch_params"] = [_DEPENDENT]
            T.func_attr(attrs)
            emit({n: T.arg(n, T.Buffer(shape, dtype)) for n, shape, dtype in arguments})
    return builder.get().without_attr("global_symbol")  # the module names it


def _threads(extents: Sequence[tuple[str, Any]], dependent: bool, body: Callable) -> None:
    """Run ``body`` on a grid, behind the kernel before it."""
    with T.frame_scope([T.thread_binding(n, thread=thread) for thread, n in extents]) as bound:
        with T.sblock("experts"):
            T.reads()
            T.writes()
            if dependent:
                LAUNCH_DEPENDENTS()
                WAIT_PREREQUISITES()
            body(*bound)


def _start(buffer: tirx.Buffer | None, *index: Any) -> tirx.Expr:
    """Address of an element, the first of what is not given; null without a buffer."""
    if buffer is None:
        return tirx.reinterpret("handle", tirx.const(0, "uint64"))
    rest = [tirx.const(0, "int32")] * (len(buffer.shape) - len(index))
    return at(buffer, *index, *rest)


def _rows(m: int | None) -> tuple[Any, tirx.Expr]:
    """Return the rows as an extent and as int32."""
    if m is not None:
        return m, tirx.const(m, "int32")
    extent = tirx.Var("m", "int64")
    return extent, tirx.Cast("int32", extent)


def scores(
    experts: int, k: int, bias: bool, m: int | None, dependent: bool = False
) -> tirx.PrimFunc:
    """Build the router's product, in float32; K is a multiple of 8."""
    extent, rows = _rows(m)
    together, each = (1, 1) if m == 1 else (4, text.SCORE_EXPERTS)
    warps = text.SCORE_WARPS
    arguments: list[tuple[str, tuple, str]]
    arguments = [("x", (extent, k), "float16"), ("weight", (experts, k), "float32")]
    arguments += [("bias", (experts,), "float32")] if bias else []
    arguments += [("scores", (extent, experts), "float32")]

    def emit(b: dict[str, tirx.Buffer]) -> None:
        def block(expert: Any, row: Any, warp: Any, lane: Any) -> None:
            shared = T.sblock_alloc_buffer((warps * together * each,), "float32", scope="shared")
            T.buffer_store(shared, tirx.const(0.0, "float32"), [warps * together * each - 1])
            T.evaluate(T.tvm_storage_sync("shared"))
            place = (_start(b["x"]), _start(b["weight"]), _start(b.get("bias")))
            make = text.SCORES[experts, k, together, each, warps]
            where = (row * together, expert * each, warp, lane)
            make(at(shared, 0), *place, _start(b["scores"]), rows, *where)

        grid = [
            ("blockIdx.x", -(-experts // each)),
            ("blockIdx.y", (rows + together - 1) // together),
            ("threadIdx.y", warps),
            ("threadIdx.x", 32),
        ]
        _threads(grid, dependent, block)

    return _kernel("expert_scores", arguments, dependent, emit)


def route(
    experts: int, chosen: int, over_all: bool, m: int | None, dependent: bool = False
) -> tirx.PrimFunc:
    """Build the choice; shares are the softmax over all experts' scores, or the chosen ones'."""
    extent, rows = _rows(m)
    warps = 1 if m == 1 else 4
    arguments = [
        ("scores", (extent, experts), "float32"),
        ("ids", (extent, chosen), "int32"),
        ("shares", (extent, chosen), "float32"),
    ]

    def emit(b: dict[str, tirx.Buffer]) -> None:
        def block(at_: Any, warp: Any, lane: Any) -> None:
            row = T.bind(at_ * warps + warp)
            with T.If(row < rows):
                with T.Then():
                    given = (_start(b[name], row) for name in ("scores", "ids", "shares"))
                    text.ROUTE[experts, chosen, over_all](*given, lane)

        grid = [
            ("blockIdx.x", (rows + warps - 1) // warps),
            ("threadIdx.y", warps),
            ("threadIdx.x", 32),
        ]
        _threads(grid, dependent, block)

    return _kernel("expert_route", arguments, dependent, emit)


def group(experts: int, chosen: int, m: int | None, dependent: bool = False) -> tirx.PrimFunc:
    """Build the order of the rows by expert: a block an expert, none waits for another."""
    extent, rows = _rows(m)
    threads = 32 if m == 1 else text.GROUP_THREADS
    arguments = [
        ("ids", (extent, chosen), "int32"),
        ("source", (extent, chosen), "int32"),
        ("place", (extent, chosen), "int32"),
        ("bounds", (experts + 1,), "int32"),
    ]

    def emit(b: dict[str, tirx.Buffer]) -> None:
        def block(expert: Any, tid: Any) -> None:
            shared = T.sblock_alloc_buffer((threads // 32,), "int32", scope="shared")
            T.buffer_store(shared, tirx.const(0, "int32"), [threads // 32 - 1])
            T.evaluate(T.tvm_storage_sync("shared"))
            given = (_start(b[name]) for name in ("ids", "source", "place", "bounds"))
            make = text.GROUP[experts, chosen, threads]
            make(at(shared, 0), *given, rows * chosen, expert, tid)

        _threads([("blockIdx.x", experts), ("threadIdx.x", threads)], dependent, block)

    return _kernel("expert_group", arguments, dependent, emit)


def combine(
    n: int, chosen: int, sorted_: bool, residual: bool, m: int | None, dependent: bool = False
) -> tirx.PrimFunc:
    """Build the weighted sum of each row's experts; N is a multiple of 8.

    Products that are not sorted by expert are of one row, in the order of its choice.
    """
    extent, rows = _rows(m)
    threads = text.SUM_THREADS
    arguments = [
        ("y", (extent * chosen, n), "float16"),
        ("shares", (extent, chosen), "float32"),
        *([("place", (extent, chosen), "int32")] if sorted_ else []),
        *([("residual", (extent, n), "float16")] if residual else []),
        ("out", (extent, n), "float16"),
    ]

    def emit(b: dict[str, tirx.Buffer]) -> None:
        def block(row: Any, piece: Any, tid: Any) -> None:
            column = T.bind((piece * threads + tid) * 8)
            with T.If(column < n):
                with T.Then():
                    names = ("shares", "place", "residual", "out")
                    given = (_start(b.get(name), row) for name in names)
                    text.SUM[n, chosen](_start(b["y"]), *given, column)

        grid = [
            ("blockIdx.x", rows),
            ("blockIdx.y", -(-n // (8 * threads))),
            ("threadIdx.x", threads),
        ]
        _threads(grid, dependent, block)

    return _kernel("expert_combine", arguments, dependent, emit)
