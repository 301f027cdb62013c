"""Steps that the device takes without the host: what it chooses in one, it starts the next from.

    begin_greedy(cache, state)                              tells where the pages of a step are
    decode_greedy(input_ids [1], cache, state, weights...)  the most likely next token, int32 [1];
                                                            -1 where logits are broken
    begin_each(rows, cache, state)                          the same for a token of each of several
    decode_each(given, previous, cache, state, weights...)  sequences, int32 [MOST_SEQUENCES]

`given` int32 [rows] holds ids, or -1 - i for token i of `previous`, which is what the last step
returned. Rows may be more than the step has sequences: those behind are padding.

Beginnings are apart, since the host may prepare step k + 1 while step k still runs: what is left of
a step takes nothing from the host, so all of it but the embedding and the choice is one CUDA graph.
So is ``forward_each``, for every number of rows that it meets. A model that asks its cache for more
than that, such as positions, has no such steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.utils import copy_with_new_vars

from relax_passes.kernels.cuda import argmax
from relax_passes.kernels.cuda.attention import cache
from relax_passes.kernels.cuda.attention.config import MOST_SEQUENCES
from relax_passes.kernels.cuda.attention.kernels import PLAN
from relax_passes.kernels.cuda.attention.lowering import STATE_TYPE
from relax_passes.ops import is_op
from relax_passes.passes.buckets import EACH_NAME, ONE
from relax_passes.rewriting import STATE, Context, count_uses, drop_dead, num_inputs


@tvm.transform.module_pass(opt_level=0, name="DeviceSteps")
def device_steps(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Add the functions where ``forward_one`` and ``forward_each`` have attention with a state."""
    functions = {gvar.name_hint: module[gvar] for gvar in module.get_global_vars()}
    builder = relax.BlockBuilder(module)
    added: dict[str, relax.Function] = {}
    one, each = functions.get(ONE.name), functions.get(EACH_NAME)
    if one is not None and _begins(one):
        added["begin_greedy"] = _begin(builder, None)
        added["decode_greedy"] = _decode(builder, one, 1)
    if each is not None and _begins(each):
        added["begin_each"] = _begin(builder, functions[PLAN])
        added["decode_each"] = _as_graphs(_decode(builder, each, None), "given")
        added[EACH_NAME] = _as_graphs(each, "input_ids")
    if not added:
        return module
    updated = tvm.IRModule(dict(builder.get().functions_items()), attrs=module.attrs)
    for name, made in added.items():
        updated[name] = made.with_attr("global_symbol", name)
    return relax.transform.Normalize()(updated)


def _begins(function: relax.Function) -> bool:
    """Whether a function asks the cache for nothing but where pages are."""
    object_ = next((p for p in function.params if isinstance(p.ty, relax.AnyType)), None)
    if object_ is None or STATE not in [p.name for p in function.params]:
        return False
    return count_uses(function)[object_] == 1


def _as_graphs(function: relax.Function, rows_of: str) -> relax.Function:
    """Let all layers be a CUDA graph for each number of rows, in memory of a constant size."""
    (rows,) = next(p for p in function.params if p.name == rows_of).ty.shape.values
    function = function.with_attr("tir_var_upper_bound", {rows.name: MOST_SEQUENCES})
    return function.with_attr("relax.rewrite_cuda_graph.capture_symbolic_vars", [rows.name])


def _begin(builder: relax.BlockBuilder, plan: Any) -> relax.Function:
    """Build the function that only begins: of one row, or of many, by a plan."""
    object_, state = relax.Var("cache", relax.AnyType()), relax.Var(STATE, STATE_TYPE)
    given, rows = [object_, state], 1
    if plan is not None:
        rows = tirx.Var("rows", "int64")
        given.insert(0, relax.Var("rows", relax.ShapeType([rows])))
    token = cache.token(rows)
    result = relax.Var("noted", cache.token_type(rows))
    block = relax.DataflowBlock([relax.VarBinding(result, token)])
    frame = relax.Function(given, relax.SeqExpr([block], result), result.ty)

    def rule(ctx: Context, _var: relax.Var, _value: relax.Expr) -> relax.Expr:
        begun = cache.begin(ctx, object_, rows)
        if plan is None:
            return begun
        return relax.call_tir(builder.get().get_global_var(PLAN), [begun, state], begun.ty)

    return Context(builder, frame.with_attr("num_input", len(given))).run(rule)


def _decode(builder: relax.BlockBuilder, function: relax.Function, m: int | None) -> relax.Function:
    """Build the step without its beginning, which ends with the choice."""
    function = copy_with_new_vars(function)
    logits = function.body.body
    (rows,) = function.params[0].ty.shape.values
    most = MOST_SEQUENCES if m is None else 1
    given = relax.Var("given", function.params[0].ty)
    previous = relax.Var("previous", relax.TensorType((most,), "int32"))
    started = m is not None

    def emit(ctx: Context, build: Callable, name: str, given: list, *out: Any) -> relax.Var:
        made = ctx.add_function(build, name)
        return ctx.emit(relax.call_tir(made, given, relax.TensorType(*out)), name)

    def rule(ctx: Context, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        nonlocal started
        if not started:
            started = True
            ids = emit(ctx, argmax.ids(most), "step_ids", [given, previous], (rows,), "int32")
            ctx.replace(function.params[0], ids)
        if is_op(value, "relax.call_dps_packed") and value.args[0].global_symbol == cache.BEGIN:
            return cache.token(rows)
        if is_op(value, "relax.call_tir") and value.args[0].name_hint == PLAN:
            ctx.replace(var, value.args[1].fields[0])
        if var.same_as(logits):
            last = ctx.emit(value, "logits")
            vocab, blocks = int(last.ty.shape.values[1]), argmax.blocks_of(m)
            best = argmax.best(vocab, m)
            found = emit(ctx, best, "argmax_best", [last], (rows, blocks), "int64")
            choose = ctx.add_function(argmax.choose(m, most), "argmax_choose")
            return relax.call_tir(choose, [found], relax.TensorType((most,), "int32"))
        return None

    made = drop_dead(Context(builder, function).run(rule))
    if m is not None:
        return made
    params = [given, previous, *made.params[1:]]
    made = relax.Function(params, made.body, made.ret_ty, made.is_pure, made.attrs)
    return made.with_attr("num_input", num_inputs(function) + 1)
