"""What every importer's result needs before it is a :class:`RelaxModuleSource`.

TVM's importers name weights in their own ways, attach their values to the function as an attribute
and mix integers (positions, masks) with the floats that can be quantized. Here weights get the
names of the original model, the values leave the module, and what is no float32 becomes a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from amx_tvm.errors import ModelError
from amx_tvm.frontends.importers.relax_module import RelaxModuleSource


def source_of(
    module: tvm.IRModule, values: Mapping[str, Any], names: Mapping[str, str], title: str
) -> RelaxModuleSource:
    """Make a source of an imported module with the function "main".

    Parameters
    ----------
    module : tvm.IRModule
        As the importer made it; the weights are parameters behind the inputs.
    values : mapping of str to array
        Values of all weights, by the importer's parameter name.
    names : mapping of str to str
        The importer's parameter name -> the model's own name; absent names stay.
    title : str
        Name of the model.

    Raises
    ------
    ModelError
        For float weights of another type than float32.
    """
    function = module["main"]
    bindings: dict[relax.Var, relax.Expr] = {}
    inputs, weights, kept = [], [], {}
    for param in function.params:
        if param.name not in values:
            inputs.append(param)
            continue
        array, name = _numpy(values[param.name]), names.get(param.name, param.name)
        if array.dtype == np.float32 and array.ndim:
            fresh = relax.Var(name, param.ty)
            weights.append(fresh)
            kept[name] = array
            bindings[param] = fresh
        elif array.dtype.kind in "iub" or array.ndim == 0:
            bindings[param] = relax.const(array)
        else:
            raise ModelError(
                f"the weight {name!r} of {title} is {array.dtype}; export the model in float32"
            )
    bound = function.bind_params(bindings) if bindings else function
    rebuilt = relax.Function(
        [*inputs, *weights], bound.body, function.ret_ty, is_pure=function.is_pure
    )
    rebuilt = rebuilt.with_attr("num_input", len(inputs)).with_attr("global_symbol", "main")
    updated = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
    updated["main"] = rebuilt
    updated = relax.transform.Normalize()(updated)
    return RelaxModuleSource(updated, kept, name=title)


def _numpy(value: Any) -> np.ndarray:
    value = value.detach() if hasattr(value, "detach") else value
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value)
