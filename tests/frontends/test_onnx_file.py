"""ONNX files, exported by torch: compiled, quantized, against the rounded module."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import amx_tvm
from amx_tvm.errors import ModelError
from amx_tvm.frontends import open_model
from tests.models.tiny import relative_error

from .conftest import one_line
from .test_torch_module import Block, ConvNet, rounded

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("build, shape", [(Block, (2, 7, 64)), (ConvNet, (2, 3, 16, 16))])
def test_equals_rounded_torch(build, shape, tmp_path):
    torch.manual_seed(0)
    module, x = build().eval(), torch.randn(shape)
    path = tmp_path / "model.onnx"
    torch.onnx.export(module, (x,), str(path), dynamo=True, external_data=False, verbose=False)
    artifact = amx_tvm.compile(path, strict=True, output=tmp_path / "out")
    assert {entry["format"] for entry in artifact.manifest.linears} == {"amxfp4"}
    with torch.no_grad():
        expected = rounded(module)(x).numpy()
    assert relative_error(np.asarray(amx_tvm.load(artifact.path)(x)), expected) < 1e-3


def test_errors_name_file_and_operator(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no protobuf")
    with pytest.raises(ModelError, match="broken.onnx"):
        open_model(path)
    node = onnx.helper.make_node("StringNormalizer", ["x"], ["y"], name="normalize")
    kind = onnx.TensorProto.STRING
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, [2])],
        [onnx.helper.make_tensor_value_info("y", kind, [2])],
    )
    onnx.save(onnx.helper.make_model(graph), str(path))
    with pytest.raises(ModelError) as raised:
        open_model(path)
    assert "StringNormalizer" in one_line(raised.value) and "normalize" in str(raised.value)
