"""Modules and models of embeddings on the GPU that is here, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import amx_tvm
from tests.models import tiny, tiny_embedding

from .test_torch_module import CASES, rounded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BOUND = 1e-3  # float16: relative difference in norm


def error(got, expected) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", sorted(CASES))
def test_functions_equal_rounded_torch(name, tmp_path):
    """Any batch; torch's tensors go in and out where they are, from a stream of their own too."""
    torch.manual_seed(0)
    build, shape = CASES[name]
    module, x = build().eval(), torch.randn(shape)
    artifact = amx_tvm.compile(
        module,
        "cuda",
        example_inputs=(x,),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        output=tmp_path / "out",
    )
    engine = amx_tvm.load(artifact.path)
    rounded(module)
    for batch in (shape[0], 3, 1):
        x = torch.randn(batch, *shape[1:])
        with torch.no_grad():
            expected = module(x).numpy()
        got = np.asarray(engine(x.numpy()))
        assert got.dtype == np.float32 and error(got, expected) < BOUND
        there = torch.from_dlpack(engine(x.cuda()))
        assert there.is_cuda and np.array_equal(there.cpu().numpy(), got)
        with torch.cuda.stream(torch.cuda.Stream()):
            slow = torch.randn(4000, 4000, device="cuda")
            for _ in range(20):
                slow = slow @ slow * 1e-3
            given = x.cuda(non_blocking=True) + 0 * slow[0, 0].nan_to_num(0, 0, 0)
            copied = torch.from_dlpack(engine(given)).clone()
        torch.cuda.synchronize()
        assert np.array_equal(copied.cpu().numpy(), got)


@pytest.mark.parametrize("family", sorted(tiny_embedding.CASES))
def test_vectors_equal_torch(family, tmp_path):
    model = tiny_embedding.make(family, tmp_path / "model")
    amx_tvm.compile(tmp_path / "model", "cuda", "none", tmp_path / "out")
    engine = amx_tvm.load(tmp_path / "out")
    generator = np.random.default_rng(1)
    tokens = [generator.integers(3, tiny.VOCAB, n).tolist() for n in (5, 1, 60, 33, 64, 65, 90)]
    expected = tiny_embedding.vectors(model, tmp_path / "model", tokens)
    np.testing.assert_allclose(engine.embed(tokens), expected, atol=3e-3)


def test_onnx_file_equals_rounded_torch(tmp_path):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    build, shape = CASES["block"]
    module, x = build().eval(), torch.randn(shape)
    path = tmp_path / "model.onnx"
    torch.onnx.export(module, (x,), str(path), dynamo=True, external_data=False, verbose=False)
    artifact = amx_tvm.compile(path, "cuda", output=tmp_path / "out")
    engine = amx_tvm.load(artifact.path)
    with torch.no_grad():
        expected = rounded(module)(x).numpy()
    got = np.asarray(engine(x.numpy()))
    assert error(got, expected) < BOUND
    there = torch.from_dlpack(engine(x.cuda()))
    assert there.is_cuda and np.array_equal(there.cpu().numpy(), got)


@pytest.mark.parametrize("name", ["mlp", "block"])
def test_stablehlo_equals_rounded_jax(name, tmp_path):
    jax = pytest.importorskip("jax")
    from . import test_stablehlo as stablehlo

    function, shapes, shape = stablehlo.CASES[name]
    p, x = {k: stablehlo.random(*s) for k, s in shapes.items()}, stablehlo.random(*shape)
    text = jax.export.export(jax.jit(function))(p, x).mlir_module()
    model = stablehlo.from_stablehlo(text, {f"p['{k}']": v for k, v in p.items()}, name)
    artifact = amx_tvm.compile(model, "cuda", output=tmp_path / "out")
    expected = np.asarray(function(stablehlo.rounded(p), x))
    got = np.asarray(amx_tvm.load(artifact.path)(x))
    assert error(got, expected) < BOUND
