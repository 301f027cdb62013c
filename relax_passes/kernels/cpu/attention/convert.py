"""Rows between the hidden states' type and the cache's.

The runtime's object takes queries, keys and values in the type of its pages.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from . import vector as v

_SERIAL_TOKENS = 16  # up to this many, waking the other threads costs more than it saves


def convert(heads: int, head_dim: int, source: str, target: str) -> tirx.PrimFunc:
    """Build y = x in another floating-point type: x and y [n, heads, head_dim]."""
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(f"cpu_convert_{target}")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
            handles = [T.arg(name, T.handle()) for name in ("x", "y")]
            n = T.int64()
            shape = (n, heads, head_dim)
            x = T.match_buffer(handles[0], shape, source)
            y = T.match_buffer(handles[1], shape, target)

            def token(t) -> None:  # noqa: ANN001
                with T.serial(0, heads) as h, T.serial(0, head_dim // v.LANES) as j:
                    v.store(y, v.load(x, [t, h, j * v.LANES]), [t, h, j * v.LANES])

            v.over_tokens(n, token, n <= _SERIAL_TOKENS)
        return builder.get()
