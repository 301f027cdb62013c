"""Lowering of a module that is no language model: one function, called with arrays.

The same passes as for language models find its linears; there is no KV cache and no tokenizer.
"""

from __future__ import annotations

from math import prod
from typing import Any

from amx_tvm.compiler.lowered_model import LoweredModel
from amx_tvm.config import QuantizationConfig
from amx_tvm.frontends.importers.relax_module import RelaxModuleSource
from amx_tvm.targets import ResolvedTarget
from relax_passes import pipeline
from relax_passes.rewriting import SINGLE


def lower_function(
    source: RelaxModuleSource,
    target: ResolvedTarget,
    config: QuantizationConfig,
    *,
    records: Any = None,
    dump: pipeline.Dump | None = None,
) -> LoweredModel:
    """Run the passes on a module's entry function; what GPUs compute of it is float16."""
    module = _prepare(source)
    module = pipeline.run(module, target.tvm, config, target.layout, records, dump)
    return LoweredModel(
        module=module,
        model={"family": "function", "name": source.name, "config": source.config},
        kv_cache={},
        functions=[source.entry],
        weight_count=max(1, sum(prod(source.shape(name)) for name in source.names())),
        source=source,
    )


def _prepare(source: RelaxModuleSource) -> Any:
    """Return the module with weights behind the inputs, and inference forms of its operators."""
    import tvm
    from tvm import relax

    module, entry = source.module, source.entry
    function = module[entry]
    by_name = {param.name: param for param in function.params}
    params = [by_name[name] for name in (*source.inputs, *source.names())]
    function = relax.Function(
        params, function.body, function.ret_ty, is_pure=function.is_pure, attrs=function.attrs
    )
    updated = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
    updated[entry] = function.with_attr("num_input", len(source.inputs)).with_attr(SINGLE, 1)
    prepare = tvm.transform.Sequential(
        [
            relax.transform.DecomposeOpsForInference(entry),
            relax.transform.ConvertToDataflow(),
            relax.transform.Normalize(),
        ]
    )
    return prepare(updated)
