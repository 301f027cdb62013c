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
from relax_passes.rewriting import identity, relax_functions, substituted, with_bindings

_SHARED = ("relax.memory.alloc_tensor", "relax.reshape")


@tvm.transform.module_pass(opt_level=0, name="ShareTensors")
def share_tensors(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Share tensors of one storage, offset, shape and type; see the module's docstring."""
    functions = dict(module.functions_items())
    for gvar, function in relax_functions(module):
        sharing = _Sharing()
        functions[gvar] = with_bindings(function, sharing.binding, sharing.renamed)
    return tvm.IRModule(functions, attrs=module.attrs)


class _Sharing:
    """One function's tensors so far, and the variables that others stand for."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int], list[tuple[Sequence, relax.Var]]] = {}
        self._instead: dict[int, relax.Var] = {}

    def binding(self, binding: relax.Binding) -> relax.Binding | None:
        """Return the next binding of the function, or None where what it makes is there."""
        value = self.renamed(binding.value)
        if isinstance(binding, relax.MatchCast):
            return relax.MatchCast(binding.var, value, binding.ty)
        found = self._found(binding.var, value)
        if found is None:
            return relax.VarBinding(binding.var, value)
        self._instead[identity(binding.var)] = found
        return None

    def renamed(self, expr: relax.Expr) -> relax.Expr:
        """Return an expression with shared variables in it."""

        def remade(call: relax.Call, args: list[relax.Expr]) -> relax.Expr:
            return relax.Call(call.op, args, call.attrs, call.ty_args, ret_ty=call.ty)

        return substituted(expr, lambda var: self._instead.get(identity(var), var), remade)

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


__all__ = ["share_tensors"]
