"""StableHLO as JAX exports it: text and bytecode, weights as arguments and as constants."""

from __future__ import annotations

import numpy as np
import pytest

import amx_tvm
from amx_tvm import formats
from amx_tvm.errors import ModelError
from amx_tvm.frontends.importers import stablehlo
from amx_tvm.frontends.importers.stablehlo import from_stablehlo
from tests.models.tiny import relative_error

from .conftest import one_line

jax = pytest.importorskip("jax")
jnp = jax.numpy


def mlp(p, x):
    return jax.nn.relu(x @ p["up"] + p["b"]) @ p["down"]


def block(p, x):
    h = x - x.mean(-1, keepdims=True)
    h = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-5) * p["g"]
    qkv = (h @ p["qkv"] + p["b"]).reshape(*x.shape[:2], 3, 4, 16)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4
    seen = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
    scores = jax.nn.softmax(jnp.where(seen, scores, -1e9), -1)
    x = x + jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape) @ p["o"]
    return x + jax.nn.gelu(x @ p["up"]) @ p["down"]


def random(*shape):
    rng = np.random.default_rng(sum(shape))
    return (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)


CASES = {
    "mlp": (mlp, {"up": (48, 96), "b": (96,), "down": (96, 20)}, (5, 48)),
    "block": (
        block,
        {"g": (64,), "qkv": (64, 192), "b": (192,), "o": (64, 64), "up": (64, 128)}
        | {"down": (128, 64)},
        (2, 7, 64),
    ),
}


def rounded(p):
    """Round matrices [K, N] along K."""
    fmt = formats.get("amxfp4")
    return {
        k: fmt.dequantize(fmt.quantize(np.ascontiguousarray(v.T))).T if v.ndim == 2 else v
        for k, v in p.items()
    }


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("how", ["arguments", "constants"])
def test_equals_rounded_jax(name, how, tmp_path):
    function, shapes, shape = CASES[name]
    p, x = {k: random(*s) for k, s in shapes.items()}, random(*shape)
    expected = np.asarray(function(rounded(p), x))
    if how == "arguments":
        text = jax.export.export(jax.jit(function))(p, x).mlir_module()
        model = from_stablehlo(text, {f"p['{k}']": v for k, v in p.items()}, name)
    else:
        model = tmp_path / "module.bin"
        exported = jax.export.export(jax.jit(lambda x: function(p, x)))(x)
        model.write_bytes(exported.mlir_module_serialized)
    artifact = amx_tvm.compile(model, strict=True, output=tmp_path / "out")
    assert {entry["spec"]["format"] for entry in artifact.manifest.linears} == {"amxfp4"}
    assert relative_error(np.asarray(amx_tvm.load(artifact.path)(x)), expected) < 1e-3


def test_errors_name_operation_and_argument():
    text = jax.export.export(jax.jit(lambda x: jnp.linalg.cholesky(x)))(random(8, 8)).mlir_module()
    with pytest.raises(ModelError) as raised:
        from_stablehlo(text)
    message = one_line(raised.value)
    assert "stablehlo.custom_call" in message and "test_stablehlo.py" in message
    text = jax.export.export(jax.jit(mlp))(
        {k: random(*s) for k, s in CASES["mlp"][1].items()}, random(5, 48)
    ).mlir_module()
    with pytest.raises(ModelError, match="no arguments w"):
        from_stablehlo(text, {"w": random(2)})
    with pytest.raises(ModelError, match="cannot be parsed"):
        from_stablehlo("module {")


def module(body, more=""):
    return (
        "module @m {\n  func.func public @main(%arg0: tensor<2xf32>) -> tensor<2xf32> {\n"
        f"{body}\n  }}\n{more}}}\n"
    )


def function(name, calls):
    lines = [f"    %{i} = call @{c}(%arg0) : (tensor<2xf32>) -> tensor<2xf32>" for i, c in calls]
    head = f"  func.func private @{name}(%arg0: tensor<2xf32>) -> tensor<2xf32> {{\n"
    return head + "\n".join(lines) + "\n    return %arg0 : tensor<2xf32>\n  }\n"


CALL = "    %0 = call @f0(%arg0) : (tensor<2xf32>) -> tensor<2xf32>\n    return %0 : tensor<2xf32>"
SPLAT = "    %c = stablehlo.constant dense<1.0> : tensor<{}xf32>\n    return %arg0 : tensor<2xf32>"
DOUBLING = [function(f"f{n}", [(0, f"f{n + 1}"), (1, f"f{n + 1}")]) for n in range(40)]
AMPLIFIED = {
    "itself": (module(CALL, function("f0", [(0, "f0")])), "'f0', which .* calls itself"),
    "doubling": (module(CALL, "".join(DOUBLING) + function("f40", [])), "operations, calls' incl"),
    "splat": (module(SPLAT.format("99999x9999")), "constants of one value"),
    "type": (module(SPLAT.format("99999x99999x99999")), "which no machine can hold"),
    "brackets": (module("    %0 = " + "(" * 100_000), "nests brackets deeper"),
    "nothing": (module(CALL), "cannot be parsed|no function of it"),
}


@pytest.mark.parametrize("name", AMPLIFIED)
def test_small_modules_that_stand_for_large_ones(name, monkeypatch):
    monkeypatch.setattr(stablehlo, "MOST_OPERATIONS", 2000)
    text, words = AMPLIFIED[name]
    with pytest.raises(ModelError, match=words):
        from_stablehlo(text)
