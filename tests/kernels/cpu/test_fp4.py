"""Four-bit activations: quantization bit for bit, and W4A4 products against the same values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cpu_oracle import Case, compile_func, empty, kernel_func, quantize_fp4, tensors

from amx_tvm import formats
from amx_tvm.errors import FormatError
from relax_passes.activation import Activation, four_bit
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


def value_of(codes, low, scales, sums, sums_low, listed):
    """What integers with second bytes stand for, float64 [M, Kp]; their sums are checked."""
    codes, low = (c.reshape(*scales.shape, 32).astype(np.float64) for c in (codes, low))
    second = np.zeros(scales.shape)
    for row, groups in zip(second, listed, strict=True):
        row[groups[1 : 1 + groups[0]]] = 1
    np.testing.assert_array_equal(sums, codes.sum(-1))
    np.testing.assert_array_equal(np.where(second, sums_low, 0), (low * second[..., None]).sum(-1))
    value = (codes + low * second[..., None] / 256) * scales[..., None].astype(np.float64)
    return value.reshape(len(scales), -1), second


@pytest.mark.parametrize("name", ["amxfp4", "amxfp4-pot", "mxfp4", "amxfp4+46"])
def test_signs_as_one_integer(name):
    """The very values of the format, with second bytes only where scales lie apart."""
    scheme = Activation.parse(f"fp4:{name}-outliers")
    for m, k in ((3, 100), (9, 544)):
        x = inputs(m, k)
        x[1, ::2] = np.maximum(x[1, ::2], 0) + x[1, ::2] / 8
        out = [empty((m, *shape), dtype) for _, shape, dtype in scheme.buffers(k, True)]
        compile_func(activations.quantize(k, scheme=scheme, sums=True))(*tensors(x), *out)
        got, second = value_of(*(o.numpy() for o in out))
        padded = np.zeros(got.shape, np.float32)
        padded[:, :k] = x
        fmt = scheme.fmt
        np.testing.assert_array_equal(got, fmt.dequantize(fmt.quantize(padded, activation=True)))
        assert second.any() == (name[:6] == "amxfp4" and name != "amxfp4-pot")
        assert not second.all()


def test_signs_far_apart_lose_the_least():
    scheme = replace(four_bit("amxfp4"), outliers=True)
    x = np.random.default_rng(0).standard_normal((2, 640)).astype(np.float32)
    x = np.where(x > 0, x, x * 2.0 ** -np.repeat(np.arange(20), 32)).astype(np.float32)
    x[1, 7] = np.nan
    out = [empty((2, *shape), dtype) for _, shape, dtype in scheme.buffers(640, True)]
    compile_func(activations.quantize(640, scheme=scheme, sums=True))(*tensors(x), *out)
    got, _ = value_of(*(o.numpy() for o in out))
    want = scheme.fmt.dequantize(scheme.fmt.quantize(x[:1], activation=True))
    np.testing.assert_array_equal(got[0, : 9 * 32], want[0, : 9 * 32])
    off = np.abs(got[0] - want[0]).reshape(-1, 32).max(-1)
    assert (off <= 2.0**-11 * np.abs(want[0]).reshape(-1, 32).max(-1)).all() and off.any()
    assert np.isnan(got[1, :32]).all() and np.isfinite(got[1, 32:]).all()


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
