"""Let registers keep what a function's caller holds anyway.

KillAfterLastUse (TVM 0.27) empties the register of every tensor behind its last use, those of
weights too, which the tuple that came in holds until the end: an instruction a weight that frees
nothing::

    w = params[7]                            w = params[7]
    linear(x, w, y)           becomes        linear(x, w, y)
    kill_tensor(w)

Runs behind KillAfterLastUse.
"""

from __future__ import annotations

import tvm
from tvm import relax

from relax_passes.ops import is_op
from relax_passes.rewriting import identity, relax_functions, with_bindings


@tvm.transform.module_pass(opt_level=0, name="KeepParameters")
def keep_parameters(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Drop the kills of tensors of a parameter; see the module's docstring."""
    functions = dict(module.functions_items())
    for gvar, function in relax_functions(module):
        functions[gvar] = _kept(function)
    return tvm.IRModule(functions, attrs=module.attrs)


def _kept(function: relax.Function) -> relax.Function:
    held = {identity(param) for param in function.params}

    def change(binding: relax.Binding) -> relax.Binding | None:
        value = binding.value
        if isinstance(value, relax.TupleGetItem) and identity(value.tuple_value) in held:
            held.add(identity(binding.var))
        elif is_op(value, "relax.memory.kill_tensor") and identity(value.args[0]) in held:
            return None
        return binding

    return with_bindings(function, change)


__all__ = ["keep_parameters"]
