"""Make each tensor of a planned storage once in a call, and each view of it.

Memory planning (TVM 0.27) gives the same few storages to the values of every layer, and every value
a tensor of its own, whose shape is computed for it where rows are a variable. The virtual machine
does both in every call, a microsecond each, which is what a short prompt on a GPU waits for::

    a = alloc_tensor(s, 0, (m, 64))          a = alloc_tensor(s, 0, (m, 64))
    norm(x, a)                               norm(x, a)
    b = reshape(a, (m, 4, 16))               b = reshape(a, (m, 4, 16))
    ...                           becomes    ...
    c = alloc_tensor(s, 0, (m, 64))
    norm(y, c)                               norm(y, a)
    d = reshape(c, (m, 4, 16))               attend(b)
    attend(d)

Planning has seen to it that nobody reads `a` any more where `c` is written. Runs behind it, when
all values have storages, and before KillAfterLastUse.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
import tvm_ffi
from tvm import relax

from relax_passes.ops import is_op
from relax_passes.rewriting import identity, relax_functions

_SHARED = ("relax.memory.alloc_tensor", "relax.reshape")


@tvm.transform.module_pass(opt_level=0, name="ShareTensors")
def share_tensors(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Share tensors of one storage, offset, shape and type; see the module's docstring."""
    functions = dict(module.functions_items())
    for gvar, function in relax_functions(module):
        functions[gvar] = _Sharing().function(function)
    return tvm.IRModule(functions, attrs=module.attrs)


class _Sharing:
    """One function's tensors so far, and the variables that others stand for."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int], list[tuple[Sequence, relax.Var]]] = {}
        self._instead: dict[int, relax.Var] = {}

    def function(self, function: relax.Function) -> relax.Function:
        """Return the function with its bindings, one by one, less those that are shared."""
        blocks = []
        for block in function.body.blocks:
            bindings = []
            for binding in block.bindings:
                if not isinstance(binding, relax.VarBinding):
                    match = binding  # a MatchCast
                    bindings.append(relax.MatchCast(match.var, self._new(match.value), match.ty))
                    continue
                value = self._new(binding.value)
                found = self._found(binding.var, value)
                if found is None:
                    bindings.append(relax.VarBinding(binding.var, value))
                else:
                    self._instead[identity(binding.var)] = found
            blocks.append(type(block)(bindings))
        body = relax.SeqExpr(blocks, self._new(function.body.body))
        return relax.Function(
            function.params, body, function.ret_ty, is_pure=function.is_pure, attrs=function.attrs
        )

    def _found(self, var: relax.Var, value: relax.Expr) -> relax.Var | None:
        """Return the variable that holds this already; note a new tensor otherwise."""
        if isinstance(value, relax.Var):  # another name
            return value if tvm_ffi.structural_equal(var.ty, value.ty) else None
        if not any(is_op(value, name) for name in _SHARED):
            return None
        of, *rest = value.args
        if not isinstance(of, relax.Var):
            return None
        known = self._made.setdefault((value.op.name, identity(of)), [])
        for others, one in known:
            if all(map(tvm_ffi.structural_equal, rest, others)):
                return one
        known.append((rest, var))
        return None

    def _new(self, expr: relax.Expr) -> relax.Expr:
        """Return an expression with shared variables in it."""
        if isinstance(expr, relax.Var):
            return self._instead.get(identity(expr), expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._new(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._new(expr.tuple_value), expr.index)
        if isinstance(expr, relax.Call):
            args = [self._new(argument) for argument in expr.args]
            if any(not a.same_as(b) for a, b in zip(args, expr.args, strict=True)):
                return relax.Call(expr.op, args, expr.attrs, expr.ty_args, ret_ty=expr.ty)
        return expr


__all__ = ["share_tensors"]
