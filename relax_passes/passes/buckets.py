"""From the one step of a model, functions for the numbers of rows that have faster kernels.

    forward(input_ids [rows], logit_positions [picks], cache, weights...) -> logits [picks, vocab]

runs any mix of sequences and picks the rows whose logits are wanted. Its buckets:

    forward_one    one row
    forward_some   at most 15 rows, of any sequences     CPUs: chains of linears are one kernel
    forward_each   the next token of each of at most     GPUs: one attention kernel a layer
                   256 sequences

All but the second return the logits of all rows, and have no ``logit_positions``.

The attribute `ROWS` says the most rows of a function that has a bound, `EACH` that every row is the
next token of a sequence of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.utils import copy_with_new_vars

from relax_passes.kernels.chain import MOST_ROWS
from relax_passes.kernels.cuda.attention.config import MOST_SEQUENCES
from relax_passes.ops import is_op
from relax_passes.rewriting import EACH, ROWS, Context, drop_dead, num_inputs

FORWARD, POSITIONS = "forward", "logit_positions"


@dataclass(frozen=True)
class Bucket:
    """A function for some numbers of rows.

    Attributes
    ----------
    name : str
        Of the function.
    rows : int
        The most.
    each : bool
        Whether each is the next one of a sequence of its own.
    picks : bool
        Whether some may be picked; all are otherwise.
    """

    name: str
    rows: int
    each: bool
    picks: bool = False


ONE, EACH_NAME = Bucket("forward_one", 1, True), "forward_each"
BUCKETS = {
    "llvm": (ONE, Bucket("forward_some", MOST_ROWS, False, picks=True)),
    "cuda": (ONE, Bucket(EACH_NAME, MOST_SEQUENCES, True)),
}


def make_buckets(target: Any) -> tvm.transform.Pass:
    """Make the pass for a target."""

    @tvm.transform.module_pass(opt_level=0, name="MakeBuckets")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        functions = {gvar.name_hint: gvar for gvar in module.get_global_vars()}
        if FORWARD not in functions:
            return module
        function = module[functions[FORWARD]]
        if POSITIONS not in [p.name for p in function.params]:
            return module
        updated = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
        for bucket in BUCKETS.get(target.kind.name, ()):
            updated[bucket.name] = narrowed(function, bucket)
        return relax.transform.Normalize()(updated)

    return run


def narrowed(function: relax.Function, bucket: Bucket) -> relax.Function:
    """Return the function of a bucket: with its number of rows, without a choice it has not."""
    given = {p.name: p for p in function.params}
    picked = given[POSITIONS]
    (rows,) = given["input_ids"].ty.shape.values

    def rule(ctx: Context, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if not bucket.picks and is_op(value, "relax.take") and value.args[1].same_as(picked):
            ctx.replace(var, value.args[0])
        return None

    function = drop_dead(Context(relax.BlockBuilder(), function).run(rule))
    inputs = num_inputs(function) - (not bucket.picks)
    function = relax.Function(
        [p for p in function.params if bucket.picks or not p.same_as(picked)],
        function.body,
        function.ret_ty,
        is_pure=function.is_pure,
        attrs=function.attrs,
    )
    if bucket.rows == 1:
        function = function.bind_symbolic_vars({rows: tirx.const(1, "int64")})
    function = copy_with_new_vars(function).with_attr("num_input", inputs)
    function = function.with_attr("global_symbol", bucket.name)
    function = function.with_attr(ROWS, bucket.rows)
    return function.with_attr(EACH, 1) if bucket.each else function
