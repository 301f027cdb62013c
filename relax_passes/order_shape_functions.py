"""Put the stores of TVM's shape functions into order, so that equal models give equal libraries.

VMShapeLower (TVM 0.27) computes all shapes of a function in one host function whose stores follow
the iteration order of a hash map keyed by addresses::

    H[2] = 512 * H[0]                    H[1] = 256 * H[0]
    H[1] = 256 * H[0]        becomes     H[2] = 512 * H[0]

Every store of such a function reads slots that were filled before it was called and writes one of
its own, so any order gives the same shapes; by slot number is the one that depends on nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import tvm
import tvm_ffi
from tvm import tirx

_ATTRIBUTE = "tirx.is_host_func"


@tvm.transform.module_pass(opt_level=0, name="OrderShapeFunctions")
def order_shape_functions(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Sort the stores of every shape function by slot; see the module's docstring."""
    functions = {}
    for gvar, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and _ATTRIBUTE in (function.attrs or {}):
            body = _sorted(function.body)
            if body is not None:
                function = function.with_body(body)
        functions[gvar] = function
    return tvm.IRModule(functions, attrs=module.attrs)


def _sorted(body: tirx.Stmt) -> tirx.Stmt | None:
    """Return the stores by slot, or None for a body that is not a list of independent stores."""
    if not isinstance(body, tirx.SeqStmt):
        return None
    stores = {int(s.indices[0]): s for s in body.seq if isinstance(s, tirx.BufferStore)}
    if len(stores) != len(body.seq) or stores.keys() & _read(stores.values()):
        return None
    return tirx.SeqStmt([stores[slot] for slot in sorted(stores)])


def _read(stores: Iterable[tirx.BufferStore]) -> set[int]:
    """Return the slots that the stored values read."""
    slots: set[int] = set()

    def visit(load: tvm.ir.TensorLoad) -> None:
        slots.add(int(load.indices[0]))

    for store in stores:
        tvm_ffi.structural_walk(store.value, (tvm.ir.TensorLoad, visit))
    return slots


__all__ = ["order_shape_functions"]
