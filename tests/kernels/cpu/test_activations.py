"""RMSNorm, silu * up and activation quantization against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_oracle import compile_func, empty, quantize_int8, quantize_outliers, silu, tensors

from relax_passes.activation import OUTLIERS
from relax_passes.kernels.cpu import activations, emit, math

SIZES = [(1, 64), (3, 100), (9, 33), (12, 576)]


def norm(x, weight, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("m,k", SIZES)
def test_rms_norm(m, k):
    rng = np.random.default_rng(k)
    x = rng.standard_normal((m, k)).astype(np.float32)
    weight = rng.standard_normal(k).astype(np.float32)
    for rows in (m, None):
        y = empty((m, k))
        compile_func(activations.rms_norm(k, rows, 1e-5))(*tensors(x, weight), y)
        np.testing.assert_allclose(y.numpy(), norm(x, weight, 1e-5), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("m,k", SIZES)
def test_silu_mul(m, k):
    rng = np.random.default_rng(k)
    gate = (rng.standard_normal((m, k)) * 10).astype(np.float32)
    up = rng.standard_normal((m, k)).astype(np.float32)
    y = empty((m, k))
    compile_func(activations.silu_mul(k))(*tensors(gate, up), y)
    np.testing.assert_allclose(y.numpy(), silu(gate.astype(np.float64)) * up, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("m,k", SIZES)
def test_gelu_by_tanh(m, k):
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((m, k)) * 10).astype(np.float32)
    y, wide = empty((m, k)), x.astype(np.float64)
    compile_func(activations.gelu_rows(k, kind="gelu_tanh"))(*tensors(x), y)
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    np.testing.assert_allclose(y.numpy(), wide * (1 + np.tanh(inner)) / 2, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("m,k", SIZES)
def test_quantize_outliers_bit_for_bit(m, k):
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((m, k)) * np.exp2(rng.integers(-20, 20, (m, 1)))).astype(np.float32)
    x[0, :32] = 0
    x[-1, k // 2] *= 50
    expected, _ = quantize_outliers(x)
    out = [empty(a.shape, str(a.dtype)) for a in expected]
    compile_func(activations.quantize(k, scheme=OUTLIERS, sums=True))(*tensors(x), *out)
    codes, low, scales, sums, low_sums, listed = (a.numpy() for a in out)
    for got, want in zip((codes, scales, sums), (expected[0], *expected[2:4]), strict=True):
        np.testing.assert_array_equal(got, want)
    assert listed[-1, 0] > 0
    for row, count in enumerate(expected[5][:, 0]):  # what is not listed is not read
        groups = expected[5][row, 1 : count + 1]
        np.testing.assert_array_equal(listed[row, : count + 1], [count, *groups])
        np.testing.assert_array_equal(low_sums[row, groups], expected[4][row, groups])
        both = [a.reshape(m, -1, 32)[row, groups] for a in (low, expected[1])]
        np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("m,k", SIZES)
def test_quantize_int8_bit_for_bit(m, k):
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((m, k)) * np.exp2(rng.integers(-20, 20, (m, 1)))).astype(np.float32)
    x[0, :32] = 0
    x[-1, -5:] = 1e-42  # subnormal scales
    codes, scales, sums = quantize_int8(x)
    out = [empty(codes.shape, "int8"), empty(scales.shape), empty(sums.shape, "int32")]
    compile_func(activations.quantize(k, sums=True))(*tensors(x), *out)
    for got, want in zip(out, (codes, scales, sums), strict=True):
        np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("prologue", ["rms_norm", "silu_mul"])
@pytest.mark.parametrize("m,k", SIZES)
def test_fused_quantization(m, k, prologue):
    rng = np.random.default_rng(k)
    x = rng.standard_normal((m, k)).astype(np.float32)
    other = rng.standard_normal(k if prologue == "rms_norm" else (m, k)).astype(np.float32)
    reference = norm(x, other, 1e-6) if prologue == "rms_norm" else silu(x.astype(float)) * other
    padded = -(-k // 32) * 32
    codes, scales = empty((m, padded), "int8"), empty((m, padded // 32))
    func = compile_func(activations.quantize(k, prologue=prologue, eps=1e-6))
    func(*tensors(x, other), codes, scales)
    step = np.repeat(scales.numpy(), 32, -1)
    value = (codes.numpy() * step)[:, :k]
    assert np.abs(value - reference).max() <= (step[:, :k] * 0.501).max()
    assert (codes.numpy()[:, k:] == 0).all()


def test_nan_makes_its_group_nan():
    x = np.ones((1, 64), np.float32)
    x[0, 3] = np.nan
    codes, scales = empty((1, 64), "int8"), empty((1, 2))
    compile_func(activations.quantize(64))(*tensors(x), codes, scales)
    assert np.isnan(scales.numpy()[0, 0]) and np.isfinite(scales.numpy()[0, 1])


def test_exp_relative_error():
    buffers = [("x", (None, 16), "float32"), ("y", (None, 16), "float32")]
    with emit.function("exp", buffers, None) as (b, m), emit.serial(0, m) as i:
        emit.store(b["y"], math.exp(emit.load(b["x"], i, 0, lanes=16), 16), i, 0, lanes=16)
    x = np.linspace(-87, 88, 16 * 4096).astype(np.float32).reshape(-1, 16)
    y = empty(x.shape)
    compile_func(b["func"])(*tensors(x), y)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(y.numpy() - exact) / exact).max() < 3e-7
    assert "expf" not in str(b["func"])


def test_quantization_of_float16():
    x = np.random.default_rng(0).standard_normal((5, 100)).astype(np.float16)
    shapes = [((5, 128), "int8"), ((5, 4), "float32"), ((5, 4), "int32")]
    results = []
    for source in ("float32", "float16"):
        out = [empty(*s) for s in shapes]
        func = compile_func(activations.quantize(100, sums=True, source=source))
        func(*tensors(x.astype(source)), *out)
        results.append(out)
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
