"""Rebuild Relax functions binding by binding: the one mechanism behind every rewriting pass here.

A pass gives a *rule*: a function that sees one bound expression and the :class:`Context`, and
returns the expression to bind instead, or None to leave it. Variables keep their identity as long
as their type stays the same, so a rule never has to track renamed variables; a variable whose type
changes is replaced everywhere below. Rules may emit new bindings in front (``Context.emit``) and
add or replace function parameters (``Context.parameter``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import tvm
import tvm_ffi
from tvm import relax

ROWS = "amx.rows"  # attribute: the most rows that a function is called with; absent: any number
EACH = "amx.each"  # attribute: every row is the next token of a sequence of its own
SINGLE = "amx.single"  # attribute: what it computes is float32, whatever a target's kernels take
STATE = "state"  # the parameter that holds what attention kernels need of the cache: no weight

Rule = Callable[["Context", relax.Var, relax.Expr], "relax.Expr | None"]


class Context:
    """What a rule may ask and do while one function is rebuilt.

    Attributes
    ----------
    function : relax.Function
        The function as it was before the rewrite.
    inputs : int
        How many leading parameters are inputs; the rest are weights.
    """

    def __init__(self, builder: relax.BlockBuilder, function: relax.Function) -> None:
        self.function = function
        self.inputs = num_inputs(function)
        self._builder = builder
        self._values: dict[relax.Var, relax.Expr] = {}
        self._replaced: dict[relax.Var, relax.Expr] = {}
        self._uses = count_uses(function)
        self._pending: list[relax.Binding] = []
        self._params: dict[str, relax.Var] = {
            p.name: p for p in list(function.params)[self.inputs :]
        }
        self._serial = 0

    def value(self, expr: relax.Expr) -> relax.Expr:
        """Follow a variable to the expression bound to it, through plain aliases."""
        while isinstance(expr, relax.Var) and expr in self._values:
            expr = self._values[expr]
        return expr

    def uses(self, var: relax.Expr) -> int:
        """How often a variable is read in the function as it was."""
        return self._uses[identity(var)] if isinstance(var, relax.Var) else 0

    def is_weight(self, expr: relax.Expr) -> bool:
        """Whether the expression is a weight parameter of the function."""
        known = self._params.get(expr.name) if isinstance(expr, relax.Var) else None
        return known is not None and known.same_as(expr)

    def parameter(self, name: str, type_: relax.TensorType) -> relax.Var:
        """Return the weight parameter of this name, adding it to the function if it is new."""
        if name not in self._params:
            self._params[name] = relax.Var(name, type_)
        return self._params[name]

    def emit(self, expr: relax.Expr, hint: str = "lv") -> relax.Var:
        """Bind an expression in front of the one being rewritten; return its variable."""
        expr = self._builder.normalize(expr)
        if isinstance(expr, relax.Var):
            return expr
        self._serial += 1
        var = relax.DataflowVar(f"{hint}_{self._serial}", expr.ty)
        self._pending.append(relax.VarBinding(var, expr))
        self._values[var] = expr
        return var

    def add_function(self, function: tvm.tirx.PrimFunc, name: str) -> tvm.ir.GlobalVar:
        """Add a TensorIR function to the module under a fresh name."""
        return self._builder.add_func(function.without_attr("global_symbol"), name)

    def call_te(self, compute: Callable, *args: object, name: str = "") -> relax.Call:
        """Add a tensor expression's function to the module; return the call of it."""
        return self._builder.call_te(compute, *args, primfunc_name_hint=name or compute.__name__)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Let code that asks for the current block builder add its functions and bindings here."""
        relax.BlockBuilder._stack.append(self._builder)
        self._builder._begin_binding_block()
        try:
            yield
        finally:
            self._pending.extend(self._builder._end_block().bindings)
            relax.BlockBuilder._stack.pop()

    def replace(self, var: relax.Var, by: relax.Expr) -> None:
        """Read ``by`` wherever ``var`` is read below this point."""
        self._replaced[var] = by

    def run(self, rule: Rule) -> relax.Function:
        """Rebuild the function under the rule."""
        blocks = []
        for block in self.function.body.blocks:
            bindings: list[relax.Binding] = []
            for binding in block.bindings:
                if not isinstance(binding, relax.VarBinding):
                    bindings.append(binding)
                    continue
                value = self._substitute(binding.value)
                new = rule(self, binding.var, value)
                bindings.extend(self._pending)
                self._pending.clear()
                value = value if new is None else self._builder.normalize(new)
                var = binding.var
                if not tvm_ffi.structural_equal(var.ty, value.ty):
                    kind = relax.DataflowVar if isinstance(var, relax.DataflowVar) else relax.Var
                    fresh = kind(var.name, value.ty)
                    self._replaced[var] = fresh
                    var = fresh
                self._values[var] = value
                bindings.append(relax.VarBinding(var, value))
            kind = type(block)
            blocks.append(kind(bindings))
        body = self._substitute(self.function.body.body)
        params = list(self.function.params)[: self.inputs] + list(self._params.values())
        result = relax.Function(
            params,
            relax.SeqExpr(blocks, body),
            self._builder.normalize(body).ty,
            is_pure=self.function.is_pure,
            attrs=self.function.attrs,
        )
        return result.with_attr("num_input", self.inputs)

    def _substitute(self, expr: relax.Expr) -> relax.Expr:
        if not self._replaced:
            return expr

        def final(var: relax.Expr) -> relax.Expr:
            while isinstance(var, relax.Var) and var in self._replaced:
                var = self._replaced[var]
            return var

        def remade(call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
            return self._builder.normalize(relax.Call(call.op, args, call.attrs, call.ty_args))

        return substituted(expr, final, remade)


def substituted(
    expr: relax.Expr,
    final: Callable[[relax.Var], relax.Expr],
    remade: Callable[[relax.Call, list[relax.Expr]], relax.Expr],
) -> relax.Expr:
    """Return a bound expression with other variables; ``remade`` makes a call of new arguments."""

    def inner(part: relax.Expr) -> relax.Expr:
        return substituted(part, final, remade)

    if isinstance(expr, relax.Var):
        return final(expr)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([inner(field) for field in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(inner(expr.tuple_value), expr.index)
    if isinstance(expr, relax.Call):
        args = [inner(argument) for argument in expr.args]
        if any(not a.same_as(b) for a, b in zip(args, expr.args, strict=True)):
            return remade(expr, args)
    return expr


def with_bindings(
    function: relax.Function,
    change: Callable[[relax.Binding], relax.Binding | None],
    result: Callable[[relax.Expr], relax.Expr] = lambda expr: expr,
) -> relax.Function:
    """Return a function with every binding changed, None dropping it, and then its result."""
    blocks = []
    for block in function.body.blocks:
        changed = [change(binding) for binding in block.bindings]
        blocks.append(type(block)([binding for binding in changed if binding is not None]))
    body = relax.SeqExpr(blocks, result(function.body.body))
    return relax.Function(
        function.params, body, function.ret_ty, is_pure=function.is_pure, attrs=function.attrs
    )


def num_inputs(function: relax.Function) -> int:
    """Count the leading parameters that are inputs; all of them where the function does not say."""
    attrs = function.attrs
    if attrs is not None and "num_input" in attrs:
        return int(attrs["num_input"])
    return len(function.params)


def marked(function: relax.Function, attribute: str) -> bool:
    """Whether a function has an attribute."""
    return function.attrs is not None and attribute in function.attrs


def variables(expr: relax.Expr) -> Iterator[relax.Var]:
    """Yield the variables that a bound expression reads, one for every time.

    Expressions are in A-normal form: calls and tuples have variables in them, or what has none.
    """
    if isinstance(expr, relax.Var):
        yield expr
    elif isinstance(expr, relax.Call):
        for argument in expr.args:
            yield from variables(argument)
    elif isinstance(expr, relax.Tuple):
        for field in expr.fields:
            yield from variables(field)
    elif isinstance(expr, relax.TupleGetItem):
        yield from variables(expr.tuple_value)


def identity(var: relax.Var) -> int:
    """Return what a variable is known by as long as something holds it.

    As the key of a dictionary it is hashed and compared in a tenth of a variable's time.
    """
    return int(var.__chandle__())


def count_uses(function: relax.Function) -> Counter[int]:
    """Count how often each variable is read in a function, by :func:`identity`."""
    uses: Counter[int] = Counter()
    for block in function.body.blocks:
        for binding in block.bindings:
            uses.update(map(identity, variables(binding.value)))
    uses.update(map(identity, variables(function.body.body)))
    return uses


def relax_functions(module: tvm.IRModule) -> Iterator[tuple[tvm.ir.GlobalVar, relax.Function]]:
    """Yield the Relax functions of a module in the order of their names."""
    for gvar in sorted(module.get_global_vars(), key=lambda g: g.name_hint):
        function = module[gvar]
        if isinstance(function, relax.Function):
            yield gvar, function


def rewrite(module: tvm.IRModule, rule: Rule) -> tvm.IRModule:
    """Apply a rule to every Relax function of a module, then drop what nothing reads any more."""
    builder = relax.BlockBuilder(module)
    rebuilt = {
        gvar: drop_dead(Context(builder, function).run(rule))
        for gvar, function in relax_functions(module)
    }
    # A copy: the builder hands out the very module that it was given.
    updated = tvm.IRModule(dict(builder.get().functions_items()), attrs=module.attrs)
    for gvar, function in rebuilt.items():
        updated[gvar] = function
    return relax.transform.Normalize()(updated)


def drop_dead(function: relax.Function) -> relax.Function:
    """Remove dataflow bindings and weight parameters that nothing reads."""
    inputs = num_inputs(function)
    live = set(map(identity, variables(function.body.body)))
    blocks = []
    for block in reversed(list(function.body.blocks)):
        dataflow = isinstance(block, relax.DataflowBlock)
        kept = []
        for binding in reversed(list(block.bindings)):
            named = dataflow and isinstance(binding, relax.VarBinding)
            if named and identity(binding.var) not in live:
                continue
            kept.append(binding)
            live.update(map(identity, variables(binding.value)))
        blocks.append(type(block)(kept[::-1]))
    params = [p for i, p in enumerate(function.params) if i < inputs or identity(p) in live]
    result = relax.Function(
        params,
        relax.SeqExpr(blocks[::-1], function.body.body),
        function.ret_ty,
        is_pure=function.is_pure,
        attrs=function.attrs,
    )
    return result


@contextmanager
def function_scope(
    builder: relax.BlockBuilder, name: str, params: list[relax.Var]
) -> Iterator[None]:
    """Do what ``builder.function`` does, and end its block where an error leaves it.

    TVM prints a warning about itself when a builder goes that still has a block.
    """
    with builder.function(name, params):
        try:
            yield
        except BaseException:
            builder._end_block()
            raise
