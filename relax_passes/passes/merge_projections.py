"""Merge linears that read the same input into one product: q, k, v and gate, up.

One product over [Nq + Nk + Nv, K] reads its input once, quantizes it once and starts one parallel
region instead of three. Linears merge when they have the same input, K, format, activation and
output type, and all or none of them have a bias; in a format with a tensor scale, of which packed
layouts have one for 16 rows, only where no tile has rows of two. The result is split again; where
the very parts are concatenated right after (as for fused attention), split and concatenation
cancel.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import tvm
from tvm import relax

from amx_tvm.formats import get as get_format
from amx_tvm.formats.packing import TILE_ROWS
from relax_passes import recipes as parameters
from relax_passes.ops import Linear, is_op
from relax_passes.rewriting import Context, relax_functions, rewrite


def _key(linear: Linear) -> tuple:
    a = linear.attrs
    return (linear.x[0], a.k, a.format, a.activation, a.out_dtype, linear.bias is not None)


def _groups(function: relax.Function) -> dict[relax.Var, list[relax.Var]]:
    """Map the first linear of every mergeable group to all of its members, in order."""
    found: dict[tuple, list[relax.Var]] = defaultdict(list)
    for block in function.body.blocks:
        for binding in block.bindings:
            if not isinstance(binding, relax.VarBinding) or not is_op(binding.value, "amx.linear"):
                continue
            linear = Linear.of(binding.value)
            a = linear.attrs
            if linear.residual is None and not (a.silu_mul or a.experts) and a.num_w == 1:
                found[_key(linear)].append((binding.var, linear))
    groups = {}
    for members in found.values():
        if len(members) > 1 and _share_no_tile([linear for _, linear in members]):
            groups[members[0][0]] = members
    return groups


def _share_no_tile(linears: list[Linear]) -> bool:
    """Whether every tile of the merged weight has rows of one weight, or may have of two."""
    name = linears[0].attrs.format
    if name == "none" or not get_format(name).row_scaled:
        return True
    return all(linear.attrs.n % TILE_ROWS == 0 for linear in linears[:-1])


@tvm.transform.module_pass(opt_level=0, name="MergeProjections")
def merge_projections(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Merge linears of one input; see the module's docstring."""
    plan = parameters.read(module)
    groups = {}
    for _, function in relax_functions(module):
        groups.update(_groups(function))
    parts_of: dict[relax.Var, tuple[relax.Var, int, int]] = {}

    def joined(ctx: Context, params: list[relax.Var]) -> relax.Var:
        name = parameters.join_names([p.name for p in params])
        recipes = [parameters.recipe_of(plan, p.name) for p in params]
        sources = tuple(s for r in recipes for s in r.sources)
        plan[name] = replace(recipes[0], sources=sources)
        shapes = [[int(v) for v in p.ty.shape.values] for p in params]
        shape = [sum(s[0] for s in shapes), *shapes[0][1:]]
        return ctx.parameter(name, relax.TensorType(shape, params[0].ty.dtype))

    def rule(ctx: Context, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if is_op(value, "relax.concat"):
            return _cancel(value, parts_of)
        if var not in groups:
            return None
        members = groups[var]
        linears = [m for _, m in members]
        weight = joined(ctx, [m.weights[0] for m in linears])
        bias = joined(ctx, [m.bias for m in linears]) if linears[0].bias is not None else None
        attrs = replace(
            linears[0].attrs,
            name=parameters.join_names([m.attrs.name for m in linears]),
            n=sum(m.attrs.n for m in linears),
        )
        x = Linear.of(value).x
        merged = ctx.emit(Linear(attrs, x, (weight,), bias).call(), "merged")
        bounds, total = [], 0
        for m in linears[:-1]:
            total += m.attrs.n
            bounds.append(total)
        pieces = ctx.emit(relax.op.split(merged, bounds, axis=-1), "pieces")
        for index, (member, _) in enumerate(members):
            parts_of[member] = (merged, index, len(members))
            if index:
                part = ctx.emit(relax.TupleGetItem(pieces, index), "part")
                ctx.replace(member, part)
                parts_of[part] = parts_of[member]
        return relax.TupleGetItem(pieces, 0)

    return parameters.write(rewrite(_same_recipe_only(module, groups, plan), rule), plan)


def _same_recipe_only(module: tvm.IRModule, groups: dict, plan: dict) -> tvm.IRModule:
    """Drop from the groups those whose weights are loaded in different ways."""
    for first in list(groups):
        ways = {
            replace(parameters.recipe_of(plan, m.weights[0].name), sources=())
            for _, m in groups[first]
        }
        if len(ways) > 1:
            del groups[first]
    return module


def _cancel(concat: relax.Call, parts_of: dict) -> relax.Expr | None:
    """Return the merged product when a concatenation puts back all of its parts in order."""
    fields = concat.args[0].fields if isinstance(concat.args[0], relax.Tuple) else None
    if not fields or any(f not in parts_of for f in fields):
        return None
    axis = int(concat.attrs.axis)
    if axis not in (-1, len(concat.ty.shape.values) - 1):
        return None
    merged, _, count = parts_of[fields[0]]
    expected = [(merged, i, count) for i in range(count)]
    if len(fields) == count and [parts_of[f] for f in fields] == expected:
        return merged
    return None
