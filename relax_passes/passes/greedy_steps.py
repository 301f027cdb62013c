"""Steps whose token the device chooses, made of ``forward_one`` on GPUs.

    begin_greedy(cache, state)                             tells where the pages of a step are
    decode_greedy(input_ids [1], cache, state, weights...)  the most likely next token, int32 [1];
                                                           -1 where logits are broken

Apart, since the host may prepare step k + 1 while step k still runs: what is left of a step takes
nothing from the host, so all of it but the embedding and the choice is one CUDA graph. A model that
asks its cache for more than that, such as positions, has no such steps.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax.utils import copy_with_new_vars

from relax_passes.kernels.cuda import argmax
from relax_passes.kernels.cuda.attention import cache
from relax_passes.kernels.cuda.attention.lowering import STATE_TYPE
from relax_passes.ops import is_op
from relax_passes.passes.buckets import ONE
from relax_passes.rewriting import STATE, Context, count_uses


@tvm.transform.module_pass(opt_level=0, name="GreedySteps")
def greedy_steps(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Add both functions where ``forward_one`` has attention with a state."""
    functions = {gvar.name_hint: module[gvar] for gvar in module.get_global_vars()}
    function = functions.get(ONE.name)
    if function is None or STATE not in [p.name for p in function.params]:
        return module
    object_ = next(p for p in function.params if isinstance(p.ty, relax.AnyType))
    if count_uses(function)[object_] != 1:
        return module
    builder = relax.BlockBuilder(module)
    added = {"begin_greedy": _begin(builder), "decode_greedy": _decode(builder, function)}
    updated = tvm.IRModule(dict(builder.get().functions_items()), attrs=module.attrs)
    for name, made in added.items():
        updated[name] = made.with_attr("global_symbol", name)
    return relax.transform.Normalize()(updated)


def _begin(builder: relax.BlockBuilder) -> relax.Function:
    """Build the function that only begins."""
    object_, state = relax.Var("cache", relax.AnyType()), relax.Var(STATE, STATE_TYPE)
    result = relax.Var("noted", cache.TOKEN_TYPE)
    block = relax.DataflowBlock([relax.VarBinding(result, cache.token())])
    frame = relax.Function([object_, state], relax.SeqExpr([block], result), cache.TOKEN_TYPE)

    def rule(ctx: Context, _var: relax.Var, _value: relax.Expr) -> relax.Expr:
        return cache.begin(ctx, object_, 1)

    return Context(builder, frame.with_attr("num_input", 2)).run(rule)


def _decode(builder: relax.BlockBuilder, function: relax.Function) -> relax.Function:
    """Build the step without its beginning, which ends with the choice."""
    function = copy_with_new_vars(function)
    logits = function.body.body

    def rule(ctx: Context, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if is_op(value, "relax.call_dps_packed") and value.args[0].global_symbol == cache.BEGIN:
            return cache.token()
        if var.same_as(logits):
            last = ctx.emit(value, "logits")
            best = ctx.add_function(argmax.best(int(last.ty.shape.values[1])), "argmax_best")
            keys = relax.TensorType((argmax.BLOCKS,), "int64")
            found = ctx.emit(relax.call_tir(best, [last], keys), "best")
            choose = ctx.add_function(argmax.choose(), "argmax_choose")
            return relax.call_tir(choose, [found], relax.TensorType((1,), "int32"))
        return None

    return Context(builder, function).run(rule)
