"""Shape functions are sorted by slot, and only where the order means nothing; equal ones shared."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.script import tirx as T

from relax_passes.passes.order_shape_functions import order_shape_functions


@T.prim_func(private=True, s_tir=True)
def one(H: T.Buffer((5,), "int64")):
    T.func_attr({"tirx.is_host_func": True})
    H[4] = T.int64(4) * H[0]
    H[2] = T.max(T.int64(3) * H[1], H[0])
    H[3] = H[1] - T.int64(1)


@T.prim_func(private=True, s_tir=True)
def same(H: T.Buffer((5,), "int64")):
    T.func_attr({"tirx.is_host_func": True})
    H[3] = H[1] - T.int64(1)
    H[4] = T.int64(4) * H[0]
    H[2] = T.max(T.int64(3) * H[1], H[0])


@T.prim_func(private=True, s_tir=True)
def dependent(H: T.Buffer((5,), "int64")):
    T.func_attr({"tirx.is_host_func": True})
    H[4] = T.int64(4) * H[0]
    H[3] = H[4] + T.int64(1)


@T.prim_func(private=True, s_tir=True)
def number(n: T.int64) -> T.int64:
    T.func_attr({"tirx.is_host_func": True})
    return n + T.int64(1)


def module_of(**callers):
    """A module whose Relax functions call these shape functions."""
    functions = {f"shape_func{i or ''}": f for i, f in enumerate(callers.values())}
    functions["compute"] = number
    builder = relax.BlockBuilder(tvm.IRModule(functions))
    for i, name in enumerate(callers):
        heap = relax.Var("heap", relax.TensorType(dtype="int64", ndim=1))
        gvar = builder.get().get_global_var(f"shape_func{i or ''}")
        with builder.function(name, [heap]):
            call = relax.Call(gvar, [heap], ret_ty=relax.TupleType([]))
            builder.emit_func_output(builder.emit(call))
    return builder.get()


def lowered(**callers):
    """What becomes of such a module."""
    module = order_shape_functions(module_of(**callers))
    called = {n: module[n].body.blocks[0].bindings[0].value.op.name_hint for n in callers}
    shapes = [g.name_hint for g in module.get_global_vars() if g.name_hint not in callers]
    return module, called, sorted(shapes)


def slots(function):
    return [int(store.indices[0]) for store in function.body.seq]


def test_equal_functions_become_one():
    module, called, shapes = lowered(a=one, b=dependent, c=same)
    assert called == {"a": "shape_func", "b": "shape_func1", "c": "shape_func"}
    assert shapes == ["compute", "shape_func", "shape_func1"]
    assert slots(module["shape_func"]) == [2, 3, 4]


def test_names_follow_the_callers():
    module, called, _ = lowered(z=dependent, a=same)
    assert called == {"a": "shape_func", "z": "shape_func1"}
    assert slots(module["shape_func"]) == [2, 3, 4]


def test_stores_that_depend_on_one_another_stay():
    module, _, _ = lowered(a=dependent)
    assert slots(module["shape_func"]) == [4, 3]
