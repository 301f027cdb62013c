"""ONNX files through TVM's importer: initializers become weights under their own names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from amx_tvm.errors import ModelError
from amx_tvm.frontends.importers.relax_module import RelaxModuleSource


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
    try:
        import onnx
    except ImportError:
        raise ModelError(
            f"reading {path} needs the package onnx; install it: pip install onnx"
        ) from None
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:
        first = (str(error).strip().splitlines() or ["?"])[0]
        raise ModelError(f"{path} cannot be read as ONNX: {first}") from None
    return from_onnx_model(model, path.stem)


def from_onnx_model(model: Any, name: str) -> RelaxModuleSource:
    """Import a loaded ``onnx.ModelProto``; see :func:`from_onnx_file`."""
    from tvm.relax.frontend.onnx import from_onnx, onnx_frontend

    from amx_tvm.frontends.importers.imported import source_of

    known = onnx_frontend._get_convert_map()
    for node in model.graph.node:
        if node.op_type not in known and node.op_type != "Constant":
            raise ModelError(
                f"the operator {node.op_type} of node {node.name or node.output[0]!r} in {name} is "
                "not supported"
            )
    module = from_onnx(model, keep_params_in_input=True)
    function = module["main"]
    inputs, attrs = int(function.attrs["num_input"]), function.attrs
    weights = list(function.params)[inputs:]
    values = {p.name: array for p, array in zip(weights, attrs["params"], strict=True)}
    # The importer writes "layer.0.weight" as "layer_0_weight".
    plain = {_sanitized(i.name): i.name for i in model.graph.initializer}
    return source_of(module, values, {k: plain.get(k, k) for k in values}, name)


def _sanitized(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
