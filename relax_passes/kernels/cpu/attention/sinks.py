"""Attention sinks behind TVM's cache object, which hands out nothing but the heads' outputs.

A sink is a logit z of a head that takes part in its softmax and adds nothing, so it scales the
head's output by sigmoid(lse - z), lse being the log-sum-exp of the scores. The kernels hand the lse
out in one more query head of each group (``KVCacheConfig.lse_heads``), whose query is not read.
"""

from __future__ import annotations

import math

from tvm import te, tirx


def with_carriers(qkv: te.Tensor, heads: int, kv_heads: int) -> te.Tensor:
    """Insert the heads that will carry the lse: one, of zeros, behind each group of queries."""
    rows, _, d = qkv.shape
    group = heads // kv_heads
    queries = heads + kv_heads

    def value(t, h, i):  # noqa: ANN001, ANN202
        source = tirx.if_then_else(h < queries, h - h // (group + 1), h - kv_heads)
        carries = tirx.all(h < queries, h % (group + 1) == group)
        return tirx.if_then_else(carries, tirx.const(0, qkv.dtype), qkv[t, source, i])

    return te.compute((rows, queries + 2 * kv_heads, d), value, "with_carriers")


def apply_sinks(y: te.Tensor, sinks: te.Tensor, group: int) -> te.Tensor:
    """Scale the heads of [rows, heads + kv heads, d] and drop those that carry the lse."""
    rows, d = y.shape[0], y.shape[2]

    def factor(t, h):  # noqa: ANN001, ANN202
        carrier, g = h // group * (group + 1) + group, h % group
        lse = y[t, carrier, g] + y[t, carrier, group + g]  # high and low part, in log2 units
        return 1.0 / (1.0 + tirx.exp(sinks[h] - lse * math.log(2)))

    factors = te.compute((rows, sinks.shape[0]), factor, "sink_factor")
    return te.compute(
        (rows, sinks.shape[0], d),
        lambda t, h, i: y[t, h // group * (group + 1) + h % group, i] * factors[t, h],
        "apply_sinks",
    )
