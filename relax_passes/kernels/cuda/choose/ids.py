"""The tokens that a step starts from: the host's, or what the device chose in the step before.

ids    given int32 [m], previous int32 [ROWS] -> int32 [m]: what is given, or where that is
-1 - i, token i of the step before
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from amx_tvm.runtime.choices import ROWS
from relax_passes.kernels.cuda.intrinsics.base import hold

_OPAQUE = 8  # pattern: fused with nothing, whatever TVM sees of the stores


def ids() -> tirx.PrimFunc:
    """Build the kernel. Tokens of broken logits, which are negative, become 0."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("step_ids")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": _OPAQUE})
            rows = tirx.Var("m", "int64")
            given = T.arg("given", T.Buffer((rows,), "int32"))
            previous = T.arg("previous", T.Buffer((ROWS,), "int32"))
            out = T.arg("ids", T.Buffer((rows,), "int32"))
            threads = [
                T.thread_binding(rows, thread="blockIdx.x"),
                T.thread_binding(32, thread="threadIdx.x"),
            ]
            with T.frame_scope(threads) as (row, lane):
                with T.sblock("ids"):
                    T.reads()
                    T.writes()
                    with T.If(tirx.EQ(lane, 0)):
                        with T.Then():
                            token = hold(given[row])
                            T.buffer_store(out, token, [row])
                            with T.If(token < 0):
                                with T.Then():
                                    known = tirx.max(previous[-1 - token], 0)
                                    T.buffer_store(out, known, [row])
    return builder.get().without_attr("global_symbol")
