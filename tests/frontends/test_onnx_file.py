"""ONNX files, exported by torch: compiled, quantized, against the rounded module."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
import torch

import amx_tvm
from amx_tvm.errors import ModelError
from amx_tvm.frontends import open_model
from tests.models.tiny import relative_error

from .conftest import one_line
from .test_torch_module import Block, ConvNet, rounded

pytest.importorskip("onnxscript")


@pytest.mark.parametrize("build, shape", [(Block, (2, 7, 64)), (ConvNet, (2, 3, 16, 16))])
def test_equals_rounded_torch(build, shape, tmp_path):
    torch.manual_seed(0)
    module, x = build().eval(), torch.randn(shape)
    path = tmp_path / "model.onnx"
    torch.onnx.export(module, (x,), str(path), dynamo=True, external_data=False, verbose=False)
    artifact = amx_tvm.compile(path, strict=True, output=tmp_path / "out")
    assert {entry["spec"]["format"] for entry in artifact.manifest.linears} == {"amxfp4"}
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


def info(name, shape, kind=onnx.TensorProto.FLOAT):
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def graph_model(nodes, outputs, weights=None, inputs=None, ir=9, opset=18, **more):
    """Return a model with the input x [4, 64] and some initializers."""
    tensors = [onnx.numpy_helper.from_array(v, k) for k, v in (weights or {}).items()]
    graph = onnx.helper.make_graph(nodes, "g", inputs or [info("x", [4, 64])], outputs, tensors)
    domains = {node.domain for node in nodes} - {""}
    opsets = [onnx.helper.make_opsetid("", opset)]
    opsets += [onnx.helper.make_opsetid(domain, 1) for domain in domains]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=ir, **more)


node = onnx.helper.make_node
X = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32)
Z = [info("z", [4, 32])]
PRODUCT = [node("MatMul", ["x", "w"], ["z"])]


def local_function():
    """x @ w in a function of the model's own, as exporters write modules."""
    body = onnx.helper.make_function(
        "own", "Product", ["a", "b"], ["c"], [node("MatMul", ["a", "b"], ["c"])],
        [onnx.helper.make_opsetid("", 18)],
    )  # fmt: skip
    call = [node("Product", ["x", "w"], ["z"], domain="own")]
    return graph_model(call, Z, {"w": W}, functions=[body])


FORMS = {
    "no initializers": lambda: (
        graph_model([node("Relu", ["x"], ["z"])], [info("z", [4, 64])]),
        np.maximum(X, 0),
    ),
    "initializers are inputs": lambda: (
        graph_model(PRODUCT, Z, {"w": W}, [info("x", [4, 64]), info("w", [64, 32])], ir=3, opset=9),
        X @ W,
    ),
    "initializers are some of the inputs": lambda: (
        graph_model(
            [node("MatMul", ["x", "w"], ["y"]), node("Add", ["y", "b"], ["z"])],
            Z,
            {"b": W[0], "w": W},
            [info("w", [64, 32]), info("x", [4, 64])],
        ),
        X @ W + W[0],
    ),
    "an initializer nobody reads": lambda: (
        graph_model(PRODUCT, Z, {"unused": W[:2], "w": W}),
        X @ W,
    ),
    "a local function": lambda: (local_function(), X @ W),
}


def product(path):
    artifact = amx_tvm.compile(path, quantization="none", output=path.parent / "out")
    return np.asarray(amx_tvm.load(artifact.path, threads=1)(X))


@pytest.mark.parametrize("form", sorted(FORMS))
def test_forms(form, tmp_path):
    model, expected = FORMS[form]()
    onnx.save(model, str(tmp_path / "m.onnx"))
    np.testing.assert_allclose(product(tmp_path / "m.onnx"), expected, atol=1e-3)


def test_external_data(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(
        graph_model(PRODUCT, Z, {"w": W}), str(path), save_as_external_data=True,
        location="weights.bin", size_threshold=0,
    )  # fmt: skip
    source = open_model(path)
    np.testing.assert_array_equal(source.load("w"), W)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match="weights.bin"):
        open_model(path)


@pytest.mark.parametrize("operator", ["Relu", "MatMul", "Unheard"])
@pytest.mark.parametrize("domain", ["com.example", "ai.onnx.ml", "com.microsoft"])
def test_operators_of_other_domains_are_no_standard_ones(operator, domain, tmp_path):
    inputs = ["x", "w"] if operator == "MatMul" else ["x"]
    nodes = [node(operator, inputs, ["z"], domain=domain, name="the_node")]
    path = tmp_path / "m.onnx"
    path.write_bytes(graph_model(nodes, Z, {"w": W}).SerializeToString())
    with pytest.raises(ModelError) as raised:
        open_model(path)
    message = one_line(raised.value)
    assert operator in message and ("the_node" in message or "m.onnx" in message)


def test_operators_inside_branches_are_checked(tmp_path):
    branches = {
        f"{side}_branch": onnx.helper.make_graph(
            [node("Relu", ["x"], [side], domain="com.example")], side, [], [info(side, [4, 64])]
        )
        for side in ("then", "else")
    }
    condition = info("c", [], onnx.TensorProto.BOOL)
    model = graph_model(
        [node("If", ["c"], ["z"], **branches)],
        [info("z", [4, 64])],
        inputs=[condition, info("x", [4, 64])],
    )
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(ModelError) as raised:
        open_model(tmp_path / "m.onnx")
    assert "If" in one_line(raised.value) or "com.example.Relu" in str(raised.value)


@pytest.mark.parametrize("place", ["../w.bin", "/dev/zero", "pipe", "sub/../../w.bin", "nothing"])
def test_weights_beside_the_model_are_files_beside_it(tmp_path, place):
    (tmp_path / "dir").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(512))
    os.mkfifo(tmp_path / "dir" / "pipe")
    weight = onnx.numpy_helper.from_array(np.zeros((16, 8), np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=place)
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, [1, 16])],
        [onnx.helper.make_tensor_value_info("y", kind, [1, 8])],
        [weight],
    )
    path = tmp_path / "dir" / "m.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ModelError, match="the tensor 'w' lies in"):
        open_model(path)


def test_errors_of_the_importer_are_refusals(tmp_path):
    kind, path = onnx.TensorProto.FLOAT, tmp_path / "m.onnx"
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Reshape", ["x", "s"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, [2, 3])],
        [onnx.helper.make_tensor_value_info("y", kind, [7])],
        [onnx.numpy_helper.from_array(np.array([7], np.int64), "s")],
    )
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ModelError, match="m is no ONNX graph that TVM can import|cannot be read"):
        open_model(path)
