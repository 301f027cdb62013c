"""Merge two attention results over disjoint keys, in place.

With outputs o1, o2 and log-sum-exps s1, s2 (log2), the result over all keys is
(o1 2^s1 + o2 2^s2) / (2^s1 + 2^s2) and its log-sum-exp log2(2^s1 + 2^s2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from relax_passes.kernels.cpu import emit as e

from . import vector as v
from .config import KVCacheConfig
from .functions import exp2, log2

_SERIAL_TOKENS = 8


@contextmanager
def attending(config: KVCacheConfig, head: Expr) -> Iterator[None]:
    """Emit what follows for heads that attend: all but those of ``config.lse_heads``."""
    if not config.lse_heads:
        yield
        return
    with T.If(v.mod(head, config.group) < config.group - 1), T.Then():
        yield


def store_lse(config: KVCacheConfig, output: Any, row: Expr, head: Expr, lse: Expr) -> None:
    """Store a head's log2-sum-exp in its group's last head; see ``KVCacheConfig.lse_heads``."""
    if not config.lse_heads:
        return
    others = config.group - 1
    g = e.let(v.mod(head, config.group), "g")
    carrier = head - g + others
    high = e.let(lse.astype(config.dtype), "high")
    low = (lse - high.astype("float32")).astype(config.dtype)
    T.buffer_store(output, high, [row, carrier, g])
    T.buffer_store(output, low, [row, carrier, g + others])


def merge_state(config: KVCacheConfig) -> tirx.PrimFunc:
    """Build the kernel: o1 [n, heads, d], lse1 [n, heads], o2, lse2; o1 and lse1 are updated."""
    heads, d = config.num_heads, config.head_dim

    def token(t: Expr, o1, s1, o2, s2) -> None:  # noqa: ANN001
        with T.serial(0, heads) as h, attending(config, h):
            a = e.let(v.splat(s1[t, h]), "a")
            b = e.let(v.splat(s2[t, h]), "b")
            top = e.let(tirx.max(a, b), "top")
            a = e.let(exp2(a - top), "a")
            b = e.let(exp2(b - top), "b")
            total = e.let(a + b, "total")
            a = e.let(a / total, "a")
            b = e.let(b / total, "b")
            with T.serial(0, d // v.LANES) as c:
                at = [t, h, c * v.LANES]
                v.store(o1, v.load(o1, at) * a + v.load(o2, at) * b, at)
            merged = e.let(log2(total) + top, "merged")
            lse = e.let(v.first_lane(merged), "lse")
            T.buffer_store(s1, lse, [t, h])
            store_lse(config, o1, t, h, lse)

    with IRBuilder() as builder:
        with T.prim_func():
            v.function("cpu_merge_state")
            handles = [T.arg(n, T.handle()) for n in ("o1", "lse1", "o2", "lse2")]
            n = T.int32()
            o1 = T.match_buffer(handles[0], (n, heads, d), config.dtype)
            s1 = T.match_buffer(handles[1], (n, heads), "float32")
            o2 = T.match_buffer(handles[2], (n, heads, d), config.dtype)
            s2 = T.match_buffer(handles[3], (n, heads), "float32")
            v.over_tokens(n, lambda t: token(t, o1, s1, o2, s2), n <= _SERIAL_TOKENS)
        return builder.get()
