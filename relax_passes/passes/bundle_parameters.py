"""Give every exported function its weights as one tuple, the same one for all.

The runtime then passes a single handle a step, behind the attention's `state` where there is one.
The tuple's order is the sorted order of all weight names over all functions and is written to the
module attribute ``amx.order``.
"""

from __future__ import annotations

import json
from math import prod

import numpy as np
import tvm
from tvm import relax

from relax_passes.rewriting import STATE, num_inputs, relax_functions

ATTRIBUTE = "amx.order"


@tvm.transform.module_pass(opt_level=0, name="BundleParameters")
def bundle_parameters(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Replace the weight parameters of all functions by one tuple; see the module's docstring."""
    types: dict[str, relax.Type] = {}
    for _, function in relax_functions(module):
        types |= {p.name: p.ty for p in _weights(function)}
    order = sorted(types)
    tuple_type = relax.TupleType([types[name] for name in order])
    updated = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
    for gvar, function in relax_functions(module):
        inputs = num_inputs(function)
        weights = _weights(function)
        if not weights:
            continue
        given = [p for p in function.params if p not in weights]
        bundle = relax.Var("params", tuple_type)
        index = {name: i for i, name in enumerate(order)}
        unpack = [relax.VarBinding(w, relax.TupleGetItem(bundle, index[w.name])) for w in weights]
        blocks = list(function.body.blocks)
        first = blocks[0]
        if isinstance(first, relax.DataflowBlock):
            blocks[0] = relax.DataflowBlock([*unpack, *first.bindings])
        else:
            blocks.insert(0, relax.BindingBlock(unpack))
        updated[gvar] = relax.Function(
            [*given, bundle],
            relax.SeqExpr(blocks, function.body.body),
            function.ret_ty,
            is_pure=function.is_pure,
            attrs=function.attrs,
        ).with_attr("num_input", inputs)
    updated = relax.transform.Normalize()(updated)
    return updated.with_attr(ATTRIBUTE, json.dumps(order))


def _weights(function: relax.Function) -> list[relax.Var]:
    return [p for p in list(function.params)[num_inputs(function) :] if p.name != STATE]


def dtypes_of(module: tvm.IRModule) -> dict[str, str]:
    """Return the type of every weight in the tuple, by name."""
    return {name: str(ty.dtype) for name, ty in _types_of(module).items()}


def bytes_of(module: tvm.IRModule) -> int:
    """Return the size of all weights in the tuple."""
    return sum(
        prod(int(v) for v in ty.shape.values) * np.dtype(str(ty.dtype)).itemsize
        for ty in _types_of(module).values()
    )


def _types_of(module: tvm.IRModule) -> dict[str, relax.TensorType]:
    order = order_of(module)
    for _, function in relax_functions(module):
        last = function.params[-1].ty if function.params else None
        if isinstance(last, relax.TupleType) and len(last.fields) == len(order):
            return dict(zip(order, last.fields, strict=True))
    return {}


def order_of(module: tvm.IRModule) -> list[str]:
    """Return the names of the weights in the order of the tuple."""
    attrs = module.attrs
    return json.loads(str(attrs[ATTRIBUTE])) if attrs is not None and ATTRIBUTE in attrs else []
