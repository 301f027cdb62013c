"""Fold the norms of each head's queries and keys into the attention that reads them.

    attention(concat(norm(q), norm(k), v)) -> attention(concat(q, k, v), norms)

Where q, k and v are the pieces of one product, in order, that product is what attention reads. On
GPUs, whose attention kernels have a head's channels at hand before they turn them; two norms and
the copies around them would take as long as attention itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import tvm
from tvm import relax

from relax_passes.attention_spec import CacheStorage
from relax_passes.ops import Attention, is_op
from relax_passes.rewriting import Context, rewrite


class _Norm(NamedTuple):
    """What is normalized, [rows, heads * head_dim], and how."""

    x: relax.Expr
    weight: relax.Expr
    eps: float


def fuse_head_norms(target: Any, storage: CacheStorage) -> tvm.transform.Pass:
    """Make the pass for a target and a way of keeping keys and values."""
    fuses = target.kind.name == "cuda" and storage.packed is None

    @tvm.transform.module_pass(opt_level=0, name="FuseHeadNorms")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        return rewrite(module, _rule) if fuses else module

    return run


def _rule(ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    if not is_op(value, "amx.attention"):
        return None
    asked = Attention.of(value)
    shaped = ctx.value(asked.qkv)
    joined = ctx.value(shaped.args[0]) if is_op(shaped, "relax.reshape") else None
    if joined is None or not is_op(joined, "relax.concat"):
        return None
    q, k, v = joined.args[0].fields
    queries, keys = (_norm(ctx, part, asked.spec.head_dim) for part in (q, k))
    if queries is None or keys is None or queries.eps != keys.eps:
        return None
    rows = ctx.emit(relax.op.reshape(_joined(ctx, [queries.x, keys.x, v]), shaped.ty.shape))
    spec = replace(asked.spec, norm_eps=queries.eps)
    return replace(asked, spec=spec, qkv=rows, norms=(queries.weight, keys.weight)).call()


def _norm(ctx: Context, part: relax.Expr, head_dim: int) -> _Norm | None:
    """Return the norm of each head behind rows of queries or keys, if that is what they are."""
    flat = ctx.value(part)
    call = ctx.value(flat.args[0]) if is_op(flat, "relax.reshape") else None
    if call is None or not is_op(call, "relax.nn.rms_norm"):
        return None
    x, weight = call.args[:2]
    heads = ctx.value(x)
    axes, last = [int(axis) for axis in call.attrs.axes], len(x.ty.shape.values) - 1
    whole = axes in ([-1], [last]) and int(x.ty.shape.values[-1]) == head_dim
    if not whole or not is_op(heads, "relax.reshape") or weight.ty.dtype != "float16":
        return None
    return _Norm(heads.args[0], weight, float(call.attrs.epsilon))


def _joined(ctx: Context, parts: list[relax.Expr]) -> relax.Expr:
    """Return the parts side by side: what they were split from, where that is it."""
    items = [ctx.value(part) for part in parts]
    if all(isinstance(item, relax.TupleGetItem) for item in items):
        whole = items[0].tuple_value
        split = ctx.value(whole)
        same = all(item.tuple_value.same_as(whole) for item in items)
        in_order = [item.index for item in items] == [0, 1, 2]
        if same and in_order and is_op(split, "relax.split") and len(split.ty.fields) == 3:
            return split.args[0]
    return ctx.emit(relax.op.concat(parts, axis=-1))
