"""A second form of the one step, in which rows have LoRA adapters: ``forward_adapted``.

    forward_adapted(input_ids [rows], adapters int32 [rows], logit_positions, cache, weights...)

reads the very weights of ``forward``, which stays as it is: rows without adapters cost what they
did. Of each row -1 or the number of its adapter is given. Behind every linear with adapters comes

    y + amx.adapter_up(amx.adapter_down(x))

after projections are merged and epilogues folded: bias and residual stay in the linear, a gate
moves behind the sum.
"""

from __future__ import annotations

from dataclasses import replace

import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.utils import copy_with_new_vars

from relax_passes import ops
from relax_passes import recipes as parameters
from relax_passes.adapters import AdapterPlan, Parts
from relax_passes.ops import AdapterAttrs, Linear, is_op
from relax_passes.passes.buckets import FORWARD
from relax_passes.rewriting import Context, drop_dead, num_inputs

NAME, SLOTS = "forward_adapted", "adapters"


def adapt(plan: AdapterPlan | None) -> tvm.transform.Pass:
    """Make the pass; without a plan it changes nothing."""

    @tvm.transform.module_pass(opt_level=0, name="Adapt")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        if plan is None:
            return module
        recipes = parameters.read(module)
        function = next(f for g, f in module.functions_items() if g.name_hint == FORWARD)
        function, slots = _with_slots(function)
        rule = _Rule(plan, recipes, slots)
        made = drop_dead(Context(relax.BlockBuilder(), function).run(rule))
        updated = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
        updated[NAME] = made.with_attr("global_symbol", NAME)
        return parameters.write(relax.transform.Normalize()(updated), recipes)

    return run


def adapted(plan: dict[str, parameters.Recipe]) -> set[str]:
    """Return the weights of which a module's plan has adapters."""
    return {name for recipe in plan.values() if recipe.adapter for name in recipe.sources}


def _with_slots(function: relax.Function) -> tuple[relax.Function, relax.Var]:
    """Return a copy of the step that is told each row's adapter, and what it is told by."""
    function = copy_with_new_vars(function)
    ids, *others = function.params
    slots = relax.Var(SLOTS, ids.ty)
    made = relax.Function(
        [ids, slots, *others],
        function.body,
        function.ret_ty,
        is_pure=function.is_pure,
        attrs=function.attrs,
    )
    return made.with_attr("num_input", num_inputs(function) + 1), slots


class _Rule:
    """Puts adapters behind the linears of one function."""

    def __init__(
        self, plan: AdapterPlan, recipes: dict[str, parameters.Recipe], slots: relax.Var
    ) -> None:
        self.plan, self.recipes, self.slots = plan, recipes, slots

    def __call__(self, ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if not is_op(value, "amx.linear"):
            return None
        linear = Linear.of(value)
        recipe = parameters.recipe_of(self.recipes, linear.weights[0].name)
        rank = self.plan.rank(recipe.sources)
        if not rank or not self._fits(linear, recipe):
            return None
        attrs = AdapterAttrs.of(Parts(self._sizes(linear, recipe), rank, linear.attrs.silu_mul))
        y = replace(linear, attrs=replace(linear.attrs, silu_mul=False)).call()
        stem = f"adapters.{linear.attrs.name}"
        a, b = (self._parameter(ctx, stem, kind, recipe, attrs, linear) for kind in ("down", "up"))
        t = ctx.emit(ops.adapter_down(linear.x[0], self.slots, a, attrs), "down")
        return ops.adapter_up(ctx.emit(y, "base"), t, self.slots, b, attrs)

    def _fits(self, linear: Linear, recipe: parameters.Recipe) -> bool:
        """Whether a linear's rows are the step's and its weight is nothing but its sources."""
        attrs = linear.attrs
        rows, shape = self.slots.ty.shape.values[0], linear.x[0].ty.shape.values
        plain = not (attrs.experts or attrs.gate_alpha or recipe.transpose or recipe.stacked > 1)
        return plain and len(shape) == 2 and tvm_ffi.structural_equal(shape[0], rows)

    def _sizes(self, linear: Linear, recipe: parameters.Recipe) -> tuple[int, ...]:
        """Return the rows of each source of a linear's weight."""
        count = len(recipe.sources)
        if count == 1:
            return (linear.attrs.n,)
        return tuple(self.plan.rows[name] for name in recipe.sources)

    def _parameter(
        self,
        ctx: Context,
        stem: str,
        kind: str,
        recipe: parameters.Recipe,
        attrs: AdapterAttrs,
        linear: Linear,
    ) -> relax.Var:
        parts, count = attrs.parts, self.plan.count
        shape = parts.down_shape(count, linear.attrs.k) if kind == "down" else parts.up_shape(count)
        name = f"{stem}.{kind}"
        self.recipes[name] = replace(recipe, adapter=kind, rank=attrs.rank)
        return ctx.parameter(name, relax.TensorType(shape, self.plan.dtype))
