"""Steps that the device takes without the host: what it chooses in one, it starts the next from.

    begin_one(cache, state)              tells where the pages of a step are
    begin_each(rows, cache, state)       the same for a token of each of several sequences
    decode_one(input_ids [1], choices..., cache, state, weights...)
    decode_each(given, previous, choices..., cache, state, weights...)
                                         a token for each row, int32 [ROWS], and of the rows
                                         that ask for log-probabilities the most likely tokens,
                                         int32 [ROWS, MOST_LOGPROBS], and the chosen token's and
                                         their values, float32 [ROWS, 1 + MOST_LOGPROBS]

The choices are options, counts, masks and biases, as `amx_tvm.runtime.choices` has them. `given`
int32 [rows] holds ids, or -1 - i for token i of `previous`, which is what the last step returned.
Rows may be more than the step has sequences: those behind are padding.

Beginnings are apart, since the host may prepare step k + 1 while step k still runs: what is left of
a step takes nothing from the host, so all of it but the embedding and the choice is one CUDA graph.
So is ``forward_each``, for every number of rows that it meets. A model that asks its cache for more
than that, such as positions, has no such steps.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.utils import copy_with_new_vars

from amx_tvm.runtime.choices import ROWS, WORDS
from amx_tvm.runtime.options import MOST_LOGPROBS
from amx_tvm.targets.cuda.target import gpu_of
from relax_passes.kernels.cuda.attention import cache
from relax_passes.kernels.cuda.attention.config import MOST_SEQUENCES
from relax_passes.kernels.cuda.attention.kernels import PLAN
from relax_passes.kernels.cuda.attention.lowering import STATE_TYPE
from relax_passes.kernels.cuda.choose.ids import ids
from relax_passes.kernels.cuda.choose.kernels import choose, tables
from relax_passes.kernels.cuda.packed_cache import lowering as packed
from relax_passes.ops import is_op
from relax_passes.passes.buckets import EACH_NAME, ONE
from relax_passes.rewriting import STATE, Context, count_uses, drop_dead, identity, num_inputs


def device_steps(target: Any) -> tvm.transform.Pass:
    """Make the pass for a target.

    It adds the functions where ``forward_one`` and ``forward_each`` have attention with a state.
    """

    @tvm.transform.module_pass(opt_level=0, name="DeviceSteps")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        return with_steps(module, target) if target.kind.name == "cuda" else module

    return run


def with_steps(module: tvm.IRModule, target: Any) -> tvm.IRModule:
    """Return the module with the functions."""
    functions = {gvar.name_hint: module[gvar] for gvar in module.get_global_vars()}
    builder = relax.BlockBuilder(module)
    added: dict[str, relax.Function] = {}
    one, each = functions.get(ONE.name), functions.get(EACH_NAME)
    if one is not None and _begins(one):
        added["begin_one"] = _begin(builder, one, None)
        added["decode_one"] = _decode(builder, one, target)
    if each is not None and _begins(each):
        added["begin_each"] = _begin(builder, each, functions[PLAN])
        added["decode_each"] = _as_graphs(_decode(builder, each, target), "given")
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
    return count_uses(function)[identity(object_)] == 1


def _as_graphs(function: relax.Function, rows_of: str) -> relax.Function:
    """Let all layers be a CUDA graph for each number of rows, in memory of a constant size."""
    (rows,) = next(p for p in function.params if p.name == rows_of).ty.shape.values
    function = function.with_attr("tir_var_upper_bound", {rows.name: MOST_SEQUENCES})
    return function.with_attr("relax.rewrite_cuda_graph.capture_symbolic_vars", [rows.name])


def _begin(builder: relax.BlockBuilder, function: relax.Function, plan: Any) -> relax.Function:
    """Build what only begins another function: of one row, or of many, by a plan."""
    values = [b.value for block in function.body.blocks for b in block.bindings]
    tells = not any(map(_asks_object, values))  # the cache is no object of TVM's
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
        if tells:
            return packed.begin(ctx, object_, rows, state, builder.get().get_global_var(PLAN))
        begun = cache.begin(ctx, object_, rows)
        if plan is None:
            return begun
        return relax.call_tir(builder.get().get_global_var(PLAN), [begun, state], begun.ty)

    return Context(builder, frame.with_attr("num_input", len(given))).run(rule)


def _decode(builder: relax.BlockBuilder, function: relax.Function, target: Any) -> relax.Function:
    """Build the step without its beginning, which ends with the choice."""
    function = copy_with_new_vars(function)
    logits, ids_of_step = function.body.body, function.params[0]
    (rows,), vocab = ids_of_step.ty.shape.values, int(function.ret_ty.shape.values[1])
    given, previous = relax.Var("given", ids_of_step.ty), _int32("previous", ROWS)
    options = _int32("options", ROWS, WORDS)
    held = [_int32(name, tirx.Var(f"{name}_rows", "int64"), n) for name, n in tables(vocab)]
    one = isinstance(rows, tirx.IntImm)
    first = [ids_of_step] if one else [given, previous]
    started = one

    def rule(ctx: Context, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        nonlocal started
        if not started:
            started = True
            gather = ctx.add_function(ids(), "step_ids")
            found = relax.call_tir(gather, first, relax.TensorType((rows,), "int32"))
            ctx.replace(ids_of_step, ctx.emit(found, "ids"))
        if _asks_object(value):
            return cache.token(rows)
        if is_op(value, "relax.call_tir") and value.args[0].name_hint == PLAN:
            ctx.replace(var, value.args[1].fields[0])
        if var.same_as(logits):
            last, arch = ctx.emit(value, "logits"), gpu_of(target).arch
            made = ctx.add_function(choose(vocab, arch), "choose")
            outs = [
                relax.TensorType((ROWS,), "int32"),
                relax.TensorType((ROWS, MOST_LOGPROBS), "int32"),
                relax.TensorType((ROWS, 1 + MOST_LOGPROBS), "float32"),
            ]
            return relax.call_tir(made, [last, options, *held], outs)
        return None

    made = drop_dead(Context(builder, function).run(rule))
    params = [*first, options, *held, *made.params[1:]]
    made = relax.Function(params, made.body, made.ret_ty, made.is_pure, made.attrs)
    return made.with_attr("num_input", num_inputs(function) + len(first) + len(held))


def _asks_object(value: relax.Expr) -> bool:
    """Whether a call has TVM's cache object tell where pages are."""
    return is_op(value, "relax.call_dps_packed") and value.args[0].global_symbol == cache.BEGIN


def _int32(name: str, *shape: int) -> relax.Var:
    return relax.Var(name, relax.TensorType(shape, "int32"))
