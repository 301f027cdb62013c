"""ONNX and StableHLO functions for CUDA without a GPU: kernels, types, machine code."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from amx_tvm.compiler.lowered import lower_source
from amx_tvm.config import QuantizationConfig
from amx_tvm.frontends import open_model
from amx_tvm.frontends.importers.stablehlo import from_stablehlo
from amx_tvm.targets import resolve
from amx_tvm.targets.cuda import toolchain
from relax_passes import pipeline

from .test_onnx_file import W, Z, graph_model, node

TARGET = resolve("cuda:sm_90a")
STABLEHLO = """
func.func public @main(%w: tensor<64x32xf32>, %x: tensor<4x64xf32>) -> tensor<4x32xf32> {
  %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0]
    : (tensor<4x64xf32>, tensor<64x32xf32>) -> tensor<4x32xf32>
  %z = stablehlo.exponential %y : tensor<4x32xf32>
  return %z : tensor<4x32xf32>
}
"""


def onnx_source(folder):
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Softmax", ["y"], ["z"], axis=-1)]
    onnx.save(graph_model(nodes, Z, {"w": W}), str(folder / "m.onnx"))
    return open_model(folder / "m.onnx")


def stablehlo_source(_):
    pytest.importorskip("jax")
    return from_stablehlo(STABLEHLO, {"arg0": W}, "small")


@pytest.mark.parametrize("make", [onnx_source, stablehlo_source])
def test_products_are_ours_and_the_rest_is_scheduled(make, tmp_path):
    source, config = make(tmp_path), QuantizationConfig().resolve("cuda")
    lowered = lower_source(source, TARGET, config)
    assert [entry["kernel"] for entry in lowered.linears] == ["cuda-fragment"]
    function = lowered.module["main"]
    assert function.params[0].ty.dtype == function.ret_ty.dtype == "float32"
    text = lowered.module.script()
    assert 'out_ty=R.Tensor((4, 32), dtype="float16")' in text  # the product
    assert "float32" in text.split("R.call_tir")[-1]  # what follows is wide
    weights = [v for v in lowered.plan.values() if v.format == "amxfp4"]
    assert weights and np.prod(W.shape) == lowered.weight_count


@pytest.mark.skipif(toolchain.find_nvcc() is None, reason="needs nvcc")
def test_a_function_becomes_machine_code(tmp_path):
    config = QuantizationConfig("none").resolve("cuda")
    lowered = lower_source(onnx_source(tmp_path), TARGET, config)
    toolchain.enable()
    pipeline.build(lowered.module, TARGET.tvm).export_library(str(tmp_path / "lib.so"))
    assert (tmp_path / "lib.so").read_bytes().count(b"\x7fELF") >= 2  # the library and the cubin
