"""W4A4 for many rows in bytes: exact whatever the scales of a group, and without bf16."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cpu_oracle import HOST, HOST_INFO, Case, assembly, compile_func, empty, quantize_fp4, tensors
from tvm.target import Target

from amx_tvm import formats
from relax_passes.activation import four_bit
from relax_passes.kernels.registry import linear_kernel
from relax_passes.spec import GROUP, LinearSpec

EXACT = 2e-6
ZNVER4 = Target({"kind": "llvm", "mcpu": "znver4"})
needs_vnni = pytest.mark.skipif(
    not HOST_INFO.has("avx512bw", "avx512vnni", "avx512vbmi"), reason="AVX-512 VNNI and VBMI"
)

# How far the two sides of a group lie apart, as a power of two: 0, 1, 2, ... in the exponents.
APART = (1.0, 2.0, 4.0, 8.0, 32.0, 2.0**12)


def groups_apart(rows, groups, seed, tiny=False):
    """Random groups of 32, their positive and negative extrema apart by every factor of APART."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, groups, GROUP))
    factor = rng.choice(APART, (rows, groups, 1)) * rng.choice([1.0, 1.25, 1.5], (rows, groups, 1))
    factor **= rng.choice([-1, 1], (rows, groups, 1))
    x = np.where(x > 0, x * factor, x) / np.maximum(factor, 1)
    x[0, 0] = 0
    x[1 % rows, 0], x[2 % rows, 0] = np.abs(x[1 % rows, 0]), -np.abs(x[2 % rows, 0])
    if tiny:  # scales among the subnormal numbers of E5M2, down to its least
        x[3:7, :] *= 2.0 ** np.array([-14.0, -15, -16, -17])[:, None, None]
    return x.reshape(rows, -1).astype(np.float32)


def product(spec, func, x, case):
    """Return (kernel's result, float64 product of the rounded operands)."""
    fmt = spec.activation.fmt
    arrays, sums = quantize_fp4(x, fmt)
    count = len(fmt.terms)
    scales = [np.repeat(s.astype(np.float64), fmt.group_size, -1) for s in arrays[count:]]
    value = sum(c * s for c, s in zip(arrays[:count], scales, strict=True))
    y = empty((x.shape[0], spec.n))
    func(*tensors(*arrays, *(sums if spec.needs_sums else ()), *case.packed), y)
    return y.numpy(), value[:, : spec.k] @ case.dense.T


FORMATS = ["amxfp4", "mxfp4", pytest.param("amxfp4-pot", marks=pytest.mark.slow)]


@needs_vnni
@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize("name", FORMATS)
def test_scales_far_apart(name, x_format):
    spec = LinearSpec(name, 41, 18 * GROUP, four_bit(x_format))
    assert "panel-w4a4" in [r.kernel for r in linear_kernel(spec, ZNVER4).rows]
    case, func = Case(spec), compile_func(linear_kernel(spec, HOST).func)
    for tiny in (False, True):
        case.set_weight(groups_apart(spec.n, 18, 1, tiny))
        for m in (32, 45):
            got, want = product(spec, func, groups_apart(m, 18, m, tiny), case)
            assert np.abs(got - want).max() < EXACT * np.abs(want).max(), f"M={m}"


@needs_vnni
def test_every_group_far_apart():
    spec = LinearSpec("amxfp4", 32, 96, four_bit("amxfp4"), m=32)
    case, func = Case(spec), compile_func(linear_kernel(spec, HOST).func)
    rng = np.random.default_rng(0)
    for factor in (4.0, 7.0, 37.0, 1 / 4.0, 1 / 7.0, 1 / 37.0):
        weight, x = (
            np.where(v > 0, v * factor, v).astype(np.float32)
            for v in (rng.standard_normal((n, spec.k)) for n in (spec.n, 32))
        )
        case.set_weight(weight)
        got, want = product(spec, func, x, case)
        assert np.linalg.norm(got - want) < EXACT * np.linalg.norm(want)


@needs_vnni
def test_nan_stays_nan():
    spec = LinearSpec("amxfp4", 32, 96, four_bit("amxfp4"), m=32)
    case, func = Case(spec), compile_func(linear_kernel(spec, HOST).func)
    x = np.random.default_rng(0).standard_normal((32, 96)).astype(np.float32)
    arrays = list(quantize_fp4(x, formats.get("amxfp4"))[0])
    for i in (2, 3):  # the scales of one group, as the quantization kernel leaves them
        arrays[i][5, 1] = np.nan
    y = empty((32, 32))
    func(*tensors(*arrays, *case.packed), y)
    assert np.isnan(y.numpy()[5]).all() and np.isfinite(np.delete(y.numpy(), 5, 0)).all()


@pytest.mark.parametrize("name", ["amxfp4", "mxfp4"])
def test_bytes_are_multiplied(name):
    spec = LinearSpec(name, 48, 96, four_bit(name), m=32)
    text = assembly(linear_kernel(spec, ZNVER4).func, ZNVER4)
    assert "vpdpbusd" in text and "vdpbf16ps" not in text


def test_other_scales_use_exact_bf16_products():
    spec = LinearSpec("amxfp4-e4m3", 48, 96, four_bit("amxfp4-e4m3"), m=32)
    assert "panel-w4a4" not in [r.kernel for r in linear_kernel(spec, ZNVER4).rows]
    text = assembly(linear_kernel(spec, ZNVER4).func, ZNVER4)
    assert "vdpbf16ps" in text and not re.search(r"call\S*\s+amx_dpbf16ps", text)
    older = Target({"kind": "llvm", "mcpu": "icelake-server"})
    assert "vdpbf16ps" not in assembly(linear_kernel(spec, older).func, older)
