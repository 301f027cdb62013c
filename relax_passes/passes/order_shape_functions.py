"""Put TVM's shape functions into a canonical form, so that equal models give equal libraries.

VMShapeLower (TVM 0.27) computes all shapes of a Relax function in one host function whose stores
follow the iteration order of a hash map keyed by addresses::

    H[2] = 512 * H[0]                    H[1] = 256 * H[0]
    H[1] = 256 * H[0]        becomes     H[2] = 512 * H[0]

Every store of such a function reads slots that were filled before it was called and writes one of
its own, so any order gives the same shapes; by slot number is the one that depends on nothing. Two
functions that came out equal by chance share one host function, so the sorted ones are shared
again and named in the order of their callers. Runs before AttachGlobalSymbol, which tells equal
functions apart by their names.
"""

from __future__ import annotations

from collections.abc import Iterable

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.tirx.buffer import BufferType

from relax_passes.rewriting import relax_functions, with_bindings

_ATTRIBUTE = "tirx.is_host_func"


@tvm.transform.module_pass(opt_level=0, name="OrderShapeFunctions")
def order_shape_functions(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Sort, share and name the shape functions; see the module's docstring."""
    functions = dict(module.functions_items())
    bodies = {g: f for g, f in functions.items() if _is_shape_function(f)}
    names = sorted(bodies, key=lambda g: (len(g.name_hint), g.name_hint))
    for gvar in names:
        bodies[gvar] = _sorted(functions.pop(gvar))
    kept: list[tirx.PrimFunc] = []

    def rename(binding: relax.Binding) -> relax.Binding:
        value = binding.value
        if not isinstance(value, relax.Call) or value.op not in bodies:
            return binding
        body = bodies[value.op]
        index = next((i for i, k in enumerate(kept) if tvm_ffi.structural_equal(k, body)), None)
        if index is None:
            index = len(kept)
            kept.append(body)
        ty = value.ty
        call = relax.Call(names[index], value.args, value.attrs, value.ty_args, ret_ty=ty)
        return relax.VarBinding(binding.var, call)

    for gvar, function in relax_functions(module):
        functions[gvar] = with_bindings(function, rename)
    functions.update(zip(names, kept, strict=False))
    return tvm.IRModule(functions, attrs=module.attrs)


def _is_shape_function(function: tvm.ir.BaseFunc) -> bool:
    """Whether it writes a heap of shapes; the host functions of ComputePrimValue take numbers."""
    if not isinstance(function, tirx.PrimFunc) or _ATTRIBUTE not in (function.attrs or {}):
        return False
    return len(function.params) == 1 and isinstance(function.params[0].ty, BufferType)


def _sorted(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a shape function with its stores by slot, if they depend on one another nowhere."""
    body = function.body
    if not isinstance(body, tirx.SeqStmt):
        return function
    stores = {int(s.indices[0]): s for s in body.seq if isinstance(s, tirx.BufferStore)}
    if len(stores) != len(body.seq) or stores.keys() & _read(stores.values()):
        return function
    return function.with_body(tirx.SeqStmt([stores[slot] for slot in sorted(stores)]))


def _read(stores: Iterable[tirx.BufferStore]) -> set[int]:
    """Return the slots that the stored values read."""
    slots: set[int] = set()

    def visit(load: tvm.ir.TensorLoad) -> None:
        slots.add(int(load.indices[0]))

    for store in stores:
        tvm_ffi.structural_walk(store.value, (tvm.ir.TensorLoad, visit))
    return slots


__all__ = ["order_shape_functions"]
