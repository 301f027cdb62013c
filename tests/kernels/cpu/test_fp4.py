"""Four-bit activations: quantization bit for bit, and W4A4 products against the same values."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_oracle import Case, compile_func, empty, kernel_func, quantize_fp4, tensors

from amx_tvm import formats
from amx_tvm.errors import FormatError
from relax_passes.activation import four_bit
from relax_passes.kernels.cpu import activations
from relax_passes.spec import LinearSpec

E2M1 = [name for name in formats.names() if formats.get(name).rule]
EXACT = 2e-6


def run_quantize(x, name, **options):
    m, k = x[0].shape
    parts = four_bit(name).buffers(k, True)
    out = [empty((m, *shape), dtype) for _, shape, dtype in parts]
    func = compile_func(activations.quantize(k, scheme=four_bit(name), sums=True, **options))
    func(*tensors(*x), *out)
    return [o.numpy() for o in out]


def inputs(m, k):
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((m, k)) * np.exp2(rng.integers(-24, 12, (m, 1)))).astype(np.float32)
    x[0, :32] = 0
    x[0, 32:64] = np.abs(x[0, 32:64])  # one-signed
    x[-1] = np.round(x[-1] / np.abs(x[-1]).max() * 24) / 4  # ties
    x[-1, 0] = 6.0
    return x


@pytest.mark.parametrize("name", E2M1)
def test_quantize_bit_for_bit(name):
    for m, k in ((3, 100), (9, 256)):
        x = inputs(m, k)
        arrays, sums = quantize_fp4(x, formats.get(name))
        for got, want in zip(run_quantize([x], name), (*arrays, *sums), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("prologue", ["rms_norm", "silu_mul"])
def test_fused_quantization(prologue):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 96)).astype(np.float32)
    other = rng.standard_normal(96 if prologue == "rms_norm" else (5, 96)).astype(np.float32)
    unfused = activations.rms_norm if prologue == "rms_norm" else activations.silu_mul
    y = empty(x.shape)
    compile_func(unfused(96))(*tensors(x, other), y)
    eps = {"eps": 1e-5} if prologue == "rms_norm" else {}
    got = run_quantize([x, other], "amxfp4", prologue=prologue, **eps)
    for a, b in zip(got, run_quantize([y.numpy()], "amxfp4"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_and_infinity():
    x = np.ones((1, 64), np.float32)
    x[0, 3], x[0, 40] = np.nan, np.inf
    scales = run_quantize([x], "amxfp4")[2]
    assert np.isnan(scales[0, 0]) and scales[0, 1] == 0.5 * 57344


def test_formats_without_a_kernel_are_refused():
    with pytest.raises(FormatError, match="int4"):
        activations.quantize(64, scheme=four_bit("int4"))


BY_FORMAT = [
    pytest.param(name, marks=[] if name in ("amxfp4", "nvfp4") else pytest.mark.slow)
    for name in E2M1
]


@pytest.mark.parametrize("rule", [None, "plain"])
@pytest.mark.parametrize("name", BY_FORMAT)
def test_both_operands_in_four_bits(name, rule):
    spec = LinearSpec(name, 57, 100, four_bit(name), bias=True, residual=True)
    case, func = Case(spec), kernel_func(spec, rule)
    for m in (1, 2, 3, 7, 9, 33) if rule is None else (1, 5):
        assert case.error(func, m) < EXACT, f"M={m}"


MIXED = [
    ("int4", "amxfp4"),
    ("int8", "nvfp4"),
    ("int8", "amxfp4"),
    ("amxfp4", "nvfp4"),
    ("nvfp4", "amxfp4"),
    ("mxfp4", "amxfp4-e4m3-tensor"),
]


@pytest.mark.slow
@pytest.mark.parametrize("weight,x", MIXED)
def test_mixed_formats(weight, x):
    spec = LinearSpec(weight, 32, 96, four_bit(x), silu_mul=True)
    case, func = Case(spec), kernel_func(spec)
    for m in (1, 6, 33):
        assert case.error(func, m) < EXACT, f"M={m}"


@pytest.mark.parametrize("epilogue", [{}, {"silu_mul": True}])
@pytest.mark.parametrize("name", ["amxfp4", "nvfp4"])
def test_many_rows(name, epilogue):
    for n in (48, 64) if not epilogue else (64,):
        spec = LinearSpec(name, n, 96, four_bit(name), **epilogue)
        case, func = Case(spec), kernel_func(spec)
        for m in (16, 32, 39):
            assert case.error(func, m) < EXACT, f"M={m}"
