"""Lower attention between rows that are all there on GPUs, where functions have it.

    permute_dims(permute_dims(x))          -> one, or none
    relax.nn.attention(q, k, v, [bias])    -> a kernel that reads each where it is: in the product
                                              that made it, say

Frontends permute to heads and back around attention: between the projections and the kernel no
copy is left. Attention of sizes or masks without a kernel stays Relax's own, in float32.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import relax, tirx

from amx_tvm.targets.cuda.target import gpu_of
from relax_passes.kernels.cuda.attention import dense
from relax_passes.ops import is_op
from relax_passes.rewriting import Context, rewrite
from relax_passes.views import View, axes_of, whole_pieces

_PIECE = 8  # float16 numbers of a 16-byte copy


def lower_dense(target: Any) -> tvm.transform.Pass:
    """Make the pass for a target; on CPUs attention stays Relax's own."""

    @tvm.transform.module_pass(opt_level=0, name="LowerDense")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        if target.kind.name != "cuda":
            return module
        functions: dict[str, tvm.ir.GlobalVar] = {}

        def rule(ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if is_op(value, "relax.permute_dims"):
                return _permuted(ctx, value)
            if is_op(value, "relax.nn.attention") or is_op(value, "relax.nn.attention_bias"):
                return attend(ctx, value)
            return None

        def attend(ctx: Context, call: relax.Call) -> relax.Expr | None:
            views = [View.of(ctx, x) for x in call.args]
            asked = _examples(call, views)
            if asked is None:
                return _wide(ctx, call)
            key = repr(asked)
            if key not in functions:
                made = dense.examples(asked, gpu_of(target).arch)
                functions[key] = ctx.add_function(made, "attention")
            lines = [_line(ctx, view.base) for view in views]
            return relax.call_tir(functions[key], lines, call.ty)

        return rewrite(module, rule)

    return run


def _wide(ctx: Context, call: relax.Call) -> relax.Expr | None:
    """Compute in float32: Relax's own sums are of its operands' type."""
    if call.ty.dtype != "float16":
        return None
    args = [ctx.emit(relax.op.astype(x, "float32")) for x in call.args]
    made = ctx.emit(relax.Call(call.op, args, call.attrs, call.ty_args))
    return relax.op.astype(made, "float16")


def _permuted(ctx: Context, value: relax.Call) -> relax.Expr | None:
    inner = ctx.value(value.args[0])
    if not is_op(inner, "relax.permute_dims"):
        return None
    first, second = axes_of(inner), axes_of(value)
    axes = [first[a] for a in second]
    x = inner.args[0]
    return x if axes == sorted(axes) else relax.op.permute_dims(x, axes)


def _line(ctx: Context, base: relax.Expr) -> relax.Expr:
    size: Any = 1
    for n in base.ty.shape.values:
        size = size * n
    return ctx.emit(relax.op.reshape(base, [size]))


def _examples(call: relax.Call, views: list[View]) -> dense.Examples | None:
    """Say what a kernel has to do, or None where there is none for it."""
    q, k, v, *rest = views
    count, rows, heads, channels = call.ty.shape.values
    keys, kv_heads = k.shape[1], k.shape[2]
    static = all(isinstance(n, tirx.IntImm) for n in (heads, channels, kv_heads))
    half = all(x.ty.dtype == "float16" for x in call.args)
    mask, window = call.attrs.causal_mask, call.attrs.window_size
    if not (static and half and dense.fits(int(channels))) or mask not in (None, "TopLeft"):
        return None
    if window is not None or len(v.shape) != 4 or int(v.shape[3]) != int(channels):
        return None
    if int(heads) % int(kv_heads) or any(not _readable(view) for view in (q, k, v)):
        return None
    bias = _bias(rest[0]) if rest else None
    if rest and bias is None:
        return None
    known = {count, rows}
    used = [x for view in views for x in (view.offset, *view.steps)]
    if not all(var in known for x in (*used, keys, count, rows) for var in _variables(x)):
        return None
    scale = call.attrs.scale
    return dense.Examples(
        shape=(*(_number(n) for n in (count, rows)), int(heads), int(channels)),
        keys=_number(keys),
        kv_heads=int(kv_heads),
        scale=float(getattr(scale, "value", scale))
        if scale is not None
        else 1.0 / math.sqrt(int(channels)),
        causal=mask == "TopLeft",
        q=_place(q),
        k=_place(k),
        v=_place(v),
        bias=bias,
    )


def _readable(view: View) -> bool:
    """Whether rows of heads are whole 16-byte pieces."""
    last = view.steps[-1]
    return _number(last) == 1 and whole_pieces((view.offset, *view.steps[:3]), _PIECE)


def _bias(view: View) -> dense.Place | None:
    """Return where a bias is, [example, head, query, key] of which all but the last may be one."""
    if len(view.shape) != 4 or _number(view.steps[3]) != 1:
        return None
    # an axis of one is the same for all
    steps = (0 if _number(n) == 1 else step for n, step in zip(view.shape, view.steps, strict=True))
    example, head, row, _ = steps
    return dense.Place(*(_number(x) for x in (view.offset, example, row, head)))


def _place(view: View) -> dense.Place:
    example, row, head, _ = view.steps
    return dense.Place(*(_number(x) for x in (view.offset, example, row, head)))


def _number(x: Any) -> Any:
    return int(x) if isinstance(x, int | tirx.IntImm) else x


def _variables(x: Any) -> list[Any]:
    return list(tirx.analysis.undefined_vars(x)) if isinstance(x, tirx.Expr) else []
