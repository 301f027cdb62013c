"""ONNX files through TVM's importer: initializers become weights under their own names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amx_tvm.errors import ModelError
from amx_tvm.extras import require
from amx_tvm.frontends.importers.relax_module import RelaxModuleSource
from amx_tvm.schema import INSIDE
from amx_tvm.strict_json import open_regular

STANDARD_DOMAINS = ("", "ai.onnx")


def from_onnx_file(path: str | os.PathLike[str]) -> RelaxModuleSource:
    """Import a model.

    Parameters
    ----------
    path : path-like
        The file; weights that it keeps beside itself are read too.

    Raises
    ------
    ModelError
        When the package onnx is missing, the file is damaged, or an operator is not supported; the
        message names the nodes.
    """
    path = Path(path)
    onnx = require("onnx", "onnx", f"reading {path}", ModelError)
    try:
        with open(path, "rb", opener=open_regular) as file:
            model = onnx.load(file, load_external_data=False)
        for tensor in _external(model.graph):
            _check_place(tensor, path)
        # By path: a model in memory can be checked only up to 2 GB, and its external data not.
        onnx.checker.check_model(str(path))
        onnx.load_external_data_for_model(model, str(path.parent))
    except ModelError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or ["?"])[0]
        raise ModelError(f"{path} cannot be read as ONNX: {first}") from None
    return from_onnx_model(model, path.stem)


def from_onnx_model(model: Any, name: str) -> RelaxModuleSource:
    """Import a loaded ``onnx.ModelProto``; see :func:`from_onnx_file`."""
    try:
        return _imported(model, name)
    except ModelError:
        raise
    except Exception as error:  # of many kinds, from an assertion to TVM's own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name} is no ONNX graph that TVM can import: {first}") from error


def _external(graph: Any) -> Iterator[Any]:
    """Yield the tensors of a graph, and of graphs in it, that lie in other files."""
    from onnx.external_data_helper import uses_external_data

    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                yield from _external(inner)
    yield from filter(uses_external_data, tensors)


def _check_place(tensor: Any, path: Path) -> None:
    """Refuse a tensor's file that is none beside the model's; a pipe would be waited for."""
    location = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
    if not INSIDE(location):
        raise ModelError(
            f"{path}: the tensor {tensor.name!r} lies in {location!r}; a file in the model's "
            "directory was expected"
        )
    try:
        os.close(open_regular(path.parent / location, os.O_RDONLY))
    except OSError as error:
        raise ModelError(
            f"{path}: the tensor {tensor.name!r} lies in {location!r}, which cannot be read: "
            f"{error}"
        ) from None


def _imported(model: Any, name: str) -> RelaxModuleSource:
    from onnx import inliner
    from tvm.relax.frontend.onnx import from_onnx

    from amx_tvm.frontends.importers.imported import source_of

    if model.functions:
        model = inliner.inline_local_functions(model)
    _check_operators(model.graph, name)
    initializers = {i.name for i in model.graph.initializer}
    # Up to IR version 3 initializers are inputs too, as defaults: here they are weights.
    inputs = [value for value in model.graph.input if value.name not in initializers]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    module = from_onnx(model, keep_params_in_input=True)
    function = module["main"]
    count, attrs = int(function.attrs["num_input"]), function.attrs
    weights = list(function.params)[count:]
    arrays = attrs["params"] if weights else []
    values = {p.name: array for p, array in zip(weights, arrays, strict=True)}
    # The importer writes "layer.0.weight" as "layer_0_weight".
    plain = {_sanitized(i.name): i.name for i in model.graph.initializer}
    return source_of(module, values, {k: plain.get(k, k) for k in values}, name)


def _check_operators(graph: Any, name: str) -> None:
    """Refuse the first operator, also of a branch's graph, that TVM's importer does not know.

    The importer knows operators by their names whatever their domain is, so another domain's
    operator of a known name would be taken for the standard one.
    """
    from onnx import AttributeProto, defs
    from tvm.relax.frontend.onnx import onnx_frontend

    known = onnx_frontend._get_convert_map()
    for node in graph.node:
        standard = node.domain in STANDARD_DOMAINS
        contributed = node.domain == "com.microsoft" and not defs.has(node.op_type)
        supported = node.op_type in known or node.op_type == "Constant"
        if not supported or not (standard or contributed):
            kind = node.op_type if standard else f"{node.domain}.{node.op_type}"
            raise ModelError(
                f"the operator {kind} of node {node.name or node.output[0]!r} in {name} is "
                "not supported"
            )
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _check_operators(attribute.g, name)


def _sanitized(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
