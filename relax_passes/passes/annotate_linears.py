"""Turn ordinary matrix products with a weight into ``amx.linear``, each with its number format.

Two orientations are found, whatever frontend wrote them:

    matmul(x, permute_dims(W))   W [N, K], as torch and Relax nn write it
    matmul(x, W)                 W [K, N], as ONNX and StableHLO write it; transposed when loaded
    amx.expert_matmul(x, W, ..)  W [experts * N, K], the stacked weights of a mixture of experts

Only a 2-D weight parameter counts. The weight stays a float parameter here; the policy's answer
(format, activation) becomes attributes, so that the printed IR shows what each linear will be.
"""

from __future__ import annotations

from dataclasses import replace

import tvm
from tvm import relax

from relax_passes import recipes as parameters
from relax_passes.ops import Linear, LinearAttrs, is_op
from relax_passes.policy import Policy
from relax_passes.rewriting import Context, rewrite


def annotate_linears(policy: Policy) -> tvm.transform.Pass:
    """Make the pass for a policy."""

    @tvm.transform.module_pass(opt_level=0, name="AnnotateLinears")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        plan = parameters.read(module)

        def rule(ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if is_op(value, "amx.expert_matmul"):
                return _experts(value, policy)
            if not is_op(value, "relax.matmul"):
                return None
            x, w = value.args
            weight, transposed = _weight(ctx, w)
            if weight is None or len(weight.ty.shape.values) != 2:
                return None
            rows, columns = (int(v) for v in weight.ty.shape.values)
            n, k = (columns, rows) if transposed else (rows, columns)
            if transposed:
                name = weight.name + ".T"
                recipe = parameters.recipe_of(plan, weight.name)
                plan[name] = replace(recipe, transpose=not recipe.transpose)
                weight = ctx.parameter(name, relax.TensorType((n, k), weight.ty.dtype))
            choice = policy.linear(_plain(weight.name))
            attrs = LinearAttrs(
                name=_plain(weight.name),
                n=n,
                k=k,
                format=choice.format,
                activation=choice.activation,
                out_dtype=str(value.ty.dtype),
            )
            return Linear(attrs, (x,), (weight,)).call()

        return parameters.write(rewrite(module, rule), plan)

    return run


def _experts(call: relax.Call, policy: Policy) -> relax.Expr:
    """Return the linear of a mixture's stacked weight; one choice holds for all experts."""
    x, weight, bounds, *bias = call.args
    experts = int(call.attrs["experts"])
    rows, columns = (int(v) for v in weight.ty.shape.values)
    choice = policy.linear(_plain(weight.name))
    attrs = LinearAttrs(
        name=_plain(weight.name),
        n=rows // experts,
        k=columns,
        format=choice.format,
        activation=choice.activation,
        out_dtype=str(x.ty.dtype),
        experts=experts,
    )
    return Linear(attrs, (x,), (weight,), bias[0] if bias else None, None, bounds).call()


def _plain(name: str) -> str:
    return name.removesuffix(".T").removesuffix(".weight")


def _weight(ctx: Context, w: relax.Expr) -> tuple[relax.Var | None, bool]:
    """Return the weight parameter behind a matmul's right side, and whether it is [K, N]."""
    if ctx.is_weight(w):
        return w, True
    inner = ctx.value(w)
    if is_op(inner, "relax.permute_dims") and ctx.is_weight(inner.args[0]):
        axes = inner.attrs.axes
        if axes is None or [int(a) for a in axes] == [1, 0]:
            return inner.args[0], False
    return None, False
