"""Lower the routing of a mixture of experts to kernels: which rows go to which expert.

The products between are linears. On GPUs a router that is not quantized is a kernel too; rows of a
step of few are gathered by the first product itself; and the sum of a row's experts adds the
residual. Of one row the products choose the experts themselves, and the second one is the sum.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import tvm
import tvm_ffi
from tvm import relax, tirx

from amx_tvm.errors import ModelError
from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cpu import experts as cpu
from relax_passes.kernels.cuda.experts import kernels as cuda
from relax_passes.kernels.cuda.linear.experts import joins
from relax_passes.ops import Linear, is_op
from relax_passes.rewriting import EACH, Context, count_uses, identity, marked, rewrite


class _Kernels(Protocol):
    """How a target does a mixture's routing; each returns what to bind in an operator's place."""

    def rule(self, ctx: Context, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        """Lower one bound expression, or leave it."""


def lower_experts(target: Any) -> tvm.transform.Pass:
    """Make the pass for a target."""

    @tvm.transform.module_pass(opt_level=0, name="LowerExperts")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        how: _Kernels = _Cuda(target) if target.kind.name == "cuda" else _Cpu()
        return rewrite(module, how.rule)

    return run


def _size(value: relax.Expr) -> tuple[int | None, int]:
    """Rows, where they are a number, and columns."""
    rows, columns = value.ty.shape.values
    return int(rows) if isinstance(rows, tirx.IntImm) else None, int(columns)


class _Cpu:
    """Routing in sequential kernels; the sum in Relax's own operators."""

    def rule(self, ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if is_op(value, "amx.expert_combine"):
            return _weighted_sum(ctx, *value.args)
        if is_op(value, "amx.expert_route"):
            rows, columns = _size(value.args[0])
            chosen, over_all = int(value.attrs["chosen"]), bool(value.attrs["over_all"])
            name, kernel = "expert_route", cpu.route(columns, chosen, over_all, rows)
        elif is_op(value, "amx.expert_group"):
            rows, columns = _size(value.args[0])
            name, kernel = "expert_group", cpu.group(int(value.attrs["experts"]), columns, rows)
        else:
            return None
        made = ctx.add_function(kernel, name)
        return relax.call_tir(made, [value.args[0]], list(value.ty.fields))


def _weighted_sum(ctx: Context, y: relax.Expr, shares: relax.Expr, place: relax.Expr) -> relax.Expr:
    tokens, chosen = shares.ty.shape.values
    factors = ctx.emit(relax.op.reshape(shares, [tokens, chosen, 1]))
    rows = ctx.emit(relax.op.take(y, place, axis=0))
    return relax.op.sum(ctx.emit(relax.op.multiply(factors, rows)), axis=1)


class _Cuda:
    """Routing in kernels of warps and blocks."""

    def __init__(self, target: Any) -> None:
        gpu = TargetInfo.of(target).gpu
        self.dependent = gpu is not None and gpu.clusters
        self.functions: dict[tuple, tvm.ir.GlobalVar] = {}
        self.combined: dict[relax.Var, relax.Call] = {}
        self.ids: dict[relax.Var, relax.Var] = {}
        self.listed: set[relax.Var] = set()  # orders that nobody needs: of one row
        self.choices: dict[relax.Var, tuple[relax.Expr, int, bool]] = {}  # scores, how they count
        self.planned: relax.Function | None = None
        self.alone: dict[relax.Var, relax.Var] = {}  # products of one row's experts -> the choice

    def rule(self, ctx: Context, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if ctx.function is not self.planned:
            self.planned, self.alone = ctx.function, _of_one_row(ctx.function)
        if var in self.alone:
            return self.choosing(ctx, self.alone[var], Linear.of(value))
        if is_op(value, "amx.expert_route"):
            return self.route(ctx, var, value)
        if is_op(value, "amx.expert_group"):
            (rows, chosen), experts = _size(value.args[0]), int(value.attrs["experts"])
            self.ids[var] = value.args[0]
            given = ("group", experts, chosen, rows)
            return self.call(ctx, given, list(value.args), list(value.ty.fields))
        if is_op(value, "amx.expert_combine"):
            if _joined(ctx, value.args[0]) is not None:
                return value.args[0]
            self.combined[var] = value
            return self.combine(ctx, value, None)
        if is_op(value, "relax.add"):
            return self.added(ctx, value)
        if is_op(value, "amx.linear"):
            return self.gather(ctx, Linear.of(value))
        return None

    def call(self, ctx: Context, key: tuple, args: list, out: Any) -> relax.Expr:
        """Call a kernel by its name and numbers."""
        name, *numbers = key
        if key not in self.functions:
            made = getattr(cuda, name)(*numbers, self.dependent)
            self.functions[key] = ctx.add_function(made, f"expert_{name}")
        return relax.call_tir(self.functions[key], args, out)

    def choosing(self, ctx: Context, route: relax.Var, linear: Linear) -> relax.Expr:
        """Let a product of one row choose the experts itself; the second one is their sum."""
        scores, chosen, over_all = self.choices[route]
        scores = ctx.emit(relax.op.reshape(scores, [linear.attrs.experts]), "scores")
        attrs = replace(linear.attrs, chosen=chosen, over_all=over_all)
        taken = ctx.value(linear.x[0])
        if is_op(taken, "relax.take"):
            attrs, x = replace(attrs, gathered=chosen), (taken.args[0],)
            return replace(linear, attrs=attrs, x=x, bounds=scores).call()
        return replace(linear, attrs=replace(attrs, joined=True), bounds=scores).call()

    def route(self, ctx: Context, var: relax.Var, value: relax.Call) -> relax.Expr:
        """Choose experts by the scores, which a router in float32 gets from a kernel here."""
        scores = value.args[0]
        (rows, experts), chosen = _size(scores), int(value.attrs["chosen"])
        if experts > cuda.MOST_EXPERTS or chosen > cuda.MOST_CHOSEN:
            raise ModelError(
                f"a layer with {experts} experts of which a token takes {chosen} has no kernel on "
                f"GPUs: expected at most {cuda.MOST_EXPERTS} and {cuda.MOST_CHOSEN}; compile for "
                "a CPU"
            )
        router = _plain_router(ctx, scores)
        if router is not None:
            given = ("scores", experts, router.attrs.k, router.bias is not None, rows)
            args = [ctx.value(router.x[0]).args[0], *router.weights]
            args += [router.bias] if router.bias is not None else []
            scores = ctx.emit(self.call(ctx, given, args, scores.ty), "scores")
        elif scores.ty.dtype != "float32":
            scores = ctx.emit(relax.op.astype(scores, "float32"))
        over_all = bool(value.attrs["over_all"])
        self.choices[var] = scores, chosen, over_all
        given = ("route", experts, chosen, over_all, rows)
        return self.call(ctx, given, [scores], list(value.ty.fields))

    def combine(self, ctx: Context, value: relax.Call, residual: relax.Expr | None) -> relax.Expr:
        """Add a row's experts, and a residual where one is given."""
        y, shares, place = value.args
        rows, chosen = _size(shares)
        in_order = ctx.value(place).tuple_value not in self.listed
        given = ("combine", _size(y)[1], chosen, in_order, residual is not None, rows)
        args = [y, shares] + ([place] if in_order else [])
        args += [residual] if residual is not None else []
        return self.call(ctx, given, args, value.ty)

    def added(self, ctx: Context, value: relax.Call) -> relax.Expr | None:
        """Fold an addition into the sum of a row's experts."""
        for y, other in (value.args, reversed(value.args)):
            alone = ctx.uses(y) == 1 and not ctx.is_weight(other)
            if not alone or not tvm_ffi.structural_equal(y.ty, other.ty):
                continue
            if (product := _joined(ctx, y)) is not None and product.residual is None:
                return replace(product, residual=other).call()
            if y in self.combined:
                return self.combine(ctx, self.combined[y], other)
        return None

    def gather(self, ctx: Context, linear: Linear) -> relax.Expr | None:
        """Let a product of a step of few rows gather them itself.

        Of one row nothing is sorted: its experts are listed as they were chosen.
        """
        attrs, taken = linear.attrs, ctx.value(linear.x[0])
        if not attrs.experts:
            return None
        order = ctx.value(linear.bounds).tuple_value
        if order in self.listed:  # the second product
            listed = replace(attrs, listed=True)
            return replace(linear, attrs=listed, bounds=self.chosen(ctx, order)).call()
        if not is_op(taken, "relax.take") or not marked(ctx.function, EACH):
            return None
        x, source = taken.args
        places = ctx.value(source)
        if not is_op(places, "relax.reshape"):
            return None
        rows, chosen = _size(places.args[0])
        if rows == 1:
            self.listed.add(order)
            attrs = replace(attrs, gathered=chosen, listed=True)
            ids = self.chosen(ctx, order)
            return replace(linear, attrs=attrs, x=(x,), bounds=ids).call()
        attrs = replace(attrs, gathered=chosen)
        return replace(linear, attrs=attrs, x=(x,), source=source).call()

    def chosen(self, ctx: Context, order: relax.Var) -> relax.Expr:
        """List the experts of the only row."""
        ids = self.ids[order]
        return ctx.emit(relax.op.reshape(ids, [ids.ty.shape.values[1]]), "chosen")


def _joined(ctx: Context, y: relax.Expr) -> Linear | None:
    """Return the product that is the sum of a row's experts, if that is what y is."""
    value = ctx.value(y)
    linear = Linear.of(value) if is_op(value, "amx.linear") else None
    return linear if linear is not None and linear.attrs.joined else None


def _of_one_row(function: relax.Function) -> dict[relax.Var, relax.Var]:
    """Map both products of the experts of one row to the choice of these, where kernels can do it.

    The sum has to be of that choice's shares, and the first product to end with a gate, whose
    result a share can multiply.
    """
    if not marked(function, EACH):
        return {}
    values = {b.var: b.value for block in function.body.blocks for b in block.bindings}
    uses = count_uses(function)
    found: dict[relax.Var, relax.Var] = {}

    def item(expr: relax.Expr, index: int, op: str) -> relax.Var | None:
        value = values.get(expr)
        if not isinstance(value, relax.TupleGetItem) or value.index != index:
            return None
        return value.tuple_value if is_op(values.get(value.tuple_value), op) else None

    for value in values.values():
        if not is_op(value, "amx.expert_combine") or _size(value.args[1])[0] != 1:
            continue
        second, shares, place = value.args
        route, order = item(shares, 1, "amx.expert_route"), item(place, 1, "amx.expert_group")
        same = order is not None and item(values[order].args[0], 0, "amx.expert_route") == route
        if route is None or not same or not is_op(values.get(second), "amx.linear"):
            continue
        linear = Linear.of(values[second])
        first = linear.x[0]
        once = uses[identity(first)] == 1 and uses[identity(second)] == 1
        if not is_op(values.get(first), "amx.linear") or not once:
            continue
        gated = Linear.of(values[first])
        fits = gated.attrs.silu_mul and joins(linear.attrs.format, linear.attrs.k)
        if fits and linear.attrs.layout and is_op(values.get(gated.x[0]), "relax.take"):
            found |= {first: route, second: route}
    return found


def _plain_router(ctx: Context, scores: relax.Expr) -> Linear | None:
    """Return the linear behind scores where it computes in float32 from float16."""
    value = ctx.value(scores)
    linear = Linear.of(value) if is_op(value, "amx.linear") else None
    if linear is None or linear.attrs.layout or linear.residual is not None:
        return None
    wide = is_op(ctx.value(linear.x[0]), "relax.astype") and linear.attrs.k % 8 == 0
    return linear if wide else None
