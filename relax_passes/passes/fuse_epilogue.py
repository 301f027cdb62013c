"""Fold what follows a linear into it: bias, residual addition and silu(gate) * up.

    add(linear, b[N])                         -> bias
    add(linear, r), same shape                -> residual
    silu(split(linear)[0]) * split(linear)[1] -> silu_mul: the gate's and the up projection's rows
                                                 alternate in tiles of 16, so that one pass over
                                                 the weights holds both halves of each product
    clamped_gate(linear)                      -> the same, with another gate

The linears of a mixture of experts take gates on GPUs only. A clamped gate that is not folded
becomes Relax's own operators.

A linear is folded only where nothing else reads it. Runs twice: for biases before projections are
merged, for the rest after.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import tvm
import tvm_ffi
from tvm import relax

from relax_passes import recipes as parameters
from relax_passes.ops import Linear, is_op
from relax_passes.rewriting import Context, rewrite

TILE = 16  # rows of gate, then rows of up: the row tile of the packed layouts


def _linear(ctx: Context, expr: relax.Expr, experts: bool = False) -> Linear | None:
    """Return the linear behind a variable that only this expression reads."""
    value = ctx.value(expr)
    if is_op(value, "amx.linear") and ctx.uses(expr) == 1:
        linear = Linear.of(value)
        return None if linear.attrs.experts and not experts else linear
    return None


def fuse_bias() -> tvm.transform.Pass:
    """Make the pass that folds bias vectors."""

    @tvm.transform.module_pass(opt_level=0, name="FuseBias")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        def rule(ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if not is_op(value, "relax.add"):
                return None
            for x, b in (value.args, reversed(value.args)):
                linear = _linear(ctx, x)
                if linear is None or linear.bias is not None or linear.residual is not None:
                    continue
                shape = [int(v) for v in b.ty.shape.values] if ctx.is_weight(b) else None
                if shape == [linear.attrs.n]:
                    return replace(linear, bias=b).call()
            return None

        return rewrite(module, rule)

    return run


def fuse_residual_and_gate(target: Any) -> tvm.transform.Pass:
    """Make the pass that folds residual additions and gates, for a target."""
    experts = target.kind.name == "cuda"

    @tvm.transform.module_pass(opt_level=0, name="FuseResidualAndGate")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        plan = parameters.read(module)

        def rule(ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if is_op(value, "relax.add"):
                return _residual(ctx, value)
            if is_op(value, "relax.multiply"):
                return _gate(ctx, value, plan, experts)
            if is_op(value, "amx.clamped_gate"):
                return _clamped(ctx, value, plan, experts)
            return None

        return parameters.write(rewrite(module, rule), plan)

    return run


def _residual(ctx: Context, value: relax.Call) -> relax.Expr | None:
    for x, r in (value.args, reversed(value.args)):
        linear = _linear(ctx, x)
        if linear is None or linear.residual is not None or linear.attrs.silu_mul:
            continue
        if tvm_ffi.structural_equal(r.ty, x.ty) and not ctx.is_weight(r):
            return replace(linear, residual=r).call()
    return None


def _gate(ctx: Context, value: relax.Call, plan: dict, experts: bool) -> relax.Expr | None:
    for a, b in (value.args, reversed(value.args)):
        silu = ctx.value(a)
        if not is_op(silu, "relax.nn.silu"):
            continue
        gate, up = ctx.value(silu.args[0]), ctx.value(b)
        if not (isinstance(gate, relax.TupleGetItem) and isinstance(up, relax.TupleGetItem)):
            continue
        same = gate.tuple_value.same_as(up.tuple_value)
        if (gate.index, up.index) != (0, 1) or not same:
            continue
        split = ctx.value(gate.tuple_value)
        linear = _linear(ctx, split.args[0], experts) if is_op(split, "relax.split") else None
        if linear is None or len(split.ty.fields) != 2:
            continue
        if not tvm_ffi.structural_equal(split.ty.fields[0], split.ty.fields[1]):
            continue
        folded = _gated(ctx, linear, plan)
        if folded is not None:
            return folded.call()
    return None


def _clamped(ctx: Context, value: relax.Call, plan: dict, experts: bool) -> relax.Expr:
    x, dtype = value.args[0], value.ty.dtype
    alpha, limit = (float(value.attrs[name]) for name in ("alpha", "limit"))
    linear = _linear(ctx, x, experts)
    folded = _gated(ctx, linear, plan) if linear is not None else None
    if folded is not None:
        attrs = replace(folded.attrs, gate_alpha=alpha, gate_limit=limit)
        return replace(folded, attrs=attrs).call()
    halves = ctx.emit(relax.op.split(x, 2, axis=-1))
    gate, up = (ctx.emit(relax.TupleGetItem(halves, i)) for i in range(2))
    gate = ctx.emit(relax.op.clip(gate, -math.inf, limit))
    up = ctx.emit(relax.op.clip(up, -limit, limit))
    up = ctx.emit(relax.op.add(up, relax.const(1.0, dtype)))
    product = ctx.emit(relax.op.multiply(up, gate))
    scaled = ctx.emit(relax.op.multiply(gate, relax.const(alpha, dtype)))
    return relax.op.multiply(product, ctx.emit(relax.op.sigmoid(scaled)))


def _gated(ctx: Context, linear: Linear, plan: dict) -> Linear | None:
    """Return a linear of gates and ups that gates what it computes, where its kernels can."""
    attrs = linear.attrs
    if linear.residual is not None or attrs.format == "none" or attrs.n % (2 * TILE):
        return None
    stacked = max(1, attrs.experts)
    weights = tuple(_interleaved(ctx, w, plan, stacked) for w in linear.weights)
    bias = linear.bias
    bias = _interleaved(ctx, bias, plan, stacked) if bias is not None else None
    return replace(linear, attrs=replace(attrs, silu_mul=True), weights=weights, bias=bias)


def _interleaved(ctx: Context, param: relax.Var, plan: dict, stacked: int) -> relax.Var:
    name = f"{param.name}.interleaved"
    recipe = parameters.recipe_of(plan, param.name)
    plan[name] = replace(recipe, interleave=TILE, stacked=stacked)
    return ctx.parameter(name, param.ty)
