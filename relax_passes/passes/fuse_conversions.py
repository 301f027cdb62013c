"""Let linears write, and quantizations read, the type in which a cache keeps keys and values.

    astype(reshape(linear), float16)                 -> out_dtype: q, k and v
    quantize_activation(reshape(astype(x, float32))) -> quantize_activation(reshape(x)): attention's
                                                        result, as a float16 cache gives it

Runs behind the lowering of attention, which converts on CPUs: there hidden states are float32.
"""

from __future__ import annotations

from dataclasses import replace

import tvm
from tvm import relax

from relax_passes.ops import Linear, is_op, quantize_activation, quantize_attrs
from relax_passes.rewriting import Context, rewrite


@tvm.transform.module_pass(opt_level=0, name="FuseConversions")
def fuse_conversions(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Fold conversions into what is in front of them and behind; see the module's docstring."""

    def rule(ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if is_op(value, "relax.astype"):
            return _written(ctx, value)
        if is_op(value, "amx.quantize_activation"):
            return _read(ctx, value)
        return None

    return rewrite(module, rule)


def _written(ctx: Context, value: relax.Call) -> relax.Expr | None:
    reshape = ctx.value(value.args[0])
    if not is_op(reshape, "relax.reshape") or ctx.uses(value.args[0]) != 1:
        return None
    call = ctx.value(reshape.args[0])
    if not is_op(call, "amx.linear") or ctx.uses(reshape.args[0]) != 1:
        return None
    linear = Linear.of(call)
    types = (linear.attrs.out_dtype, value.ty.dtype)
    if types != ("float32", "float16") or linear.attrs.format == "none" or linear.attrs.experts:
        return None
    attrs = replace(linear.attrs, out_dtype="float16")
    return relax.op.reshape(ctx.emit(replace(linear, attrs=attrs).call()), reshape.ty.shape)


def _read(ctx: Context, value: relax.Call) -> relax.Expr | None:
    attrs, x = quantize_attrs(value), value.args[0]
    reshape = ctx.value(x)
    if attrs.prologue != "none" or not is_op(reshape, "relax.reshape"):
        return None
    converted = ctx.value(reshape.args[0])
    if not is_op(converted, "relax.astype") or converted.args[0].ty.dtype != "float16":
        return None
    given = ctx.emit(relax.op.reshape(converted.args[0], x.ty.shape))
    return quantize_activation([given], attrs)
