"""Linears against float64: every format, activation type, epilogue and awkward size."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from cpu_oracle import HOST, HOST_INFO, Case, empty, kernel_func, tensors

from amx_tvm import formats
from amx_tvm.errors import TargetError
from relax_passes.activation import FLOAT32, INT8, OUTLIERS, four_bit
from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cpu.linear import panel
from relax_passes.kernels.cpu.linear.knobs import CpuKnobs
from relax_passes.kernels.cpu.linear.rules import CPU_RULES
from relax_passes.kernels.registry import linear_kernel
from relax_passes.spec import LinearSpec

ROWS = (1, 2, 3, 7, 8, 9, 33)
FEW = 15  # rows at most, where a test has no more: panels are not compiled then
TOLERANCE = 2e-6  # float32 sums in another order
MERGED = 4e-3  # panels merge two scales that lie far apart with a rounding, see panel.py
EPILOGUES = {
    "bias+residual": {"bias": True, "residual": True},
    "silu_mul": {"silu_mul": True, "bias": True, "residual": True},
}
RUNNABLE = [r.name for r in CPU_RULES if r.arch in ("", HOST_INFO.arch)]

QUICK = ("amxfp4", "mxfp4", "nvfp4", "int4", "int8")  # the others share their kernels' text
BY_FORMAT = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in formats.names()
]


def check(spec, rule, rows=ROWS):
    if linear_or_none(spec, rule) is None:
        pytest.skip(f"rule {rule} needs features that this machine lacks")
    case, func = Case(spec), kernel_func(spec, rule)
    for m in rows:
        assert case.error(func, m) < limit(spec, rule, m), f"M={m}"


def limit(spec, rule, m):
    """The tolerance: wider where AVX-512 kernels merge two scales of a format, for several rows."""
    merges = rule == "avx512" and spec.activation.integer
    merges = merges and panel.supports(spec.fmt) and len(spec.fmt.terms) == 2
    return MERGED if merges and m >= CpuKnobs().merge_rows else TOLERANCE


def linear_or_none(spec, rule):
    found = next(r for r in CPU_RULES if r.name == rule)
    return found.apply(spec, HOST_INFO)


@pytest.mark.parametrize("activation", [INT8, OUTLIERS, FLOAT32], ids=str)
@pytest.mark.parametrize("name", BY_FORMAT)
def test_every_format_on_the_best_rule(name, activation):
    spec = LinearSpec(name, 57, 100, activation, bias=True, residual=True)
    case, func = Case(spec), kernel_func(spec)
    for m in ROWS:
        assert case.error(func, m) < limit(spec, RUNNABLE[0], m), f"M={m}"


def test_merged_scales_cost_little():
    spec = LinearSpec("amxfp4", 64, 2048, INT8, m=16)
    got, want = Case(spec).run(kernel_func(spec), 16)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 5e-4


def test_merged_scales_are_exact_where_the_signs_are_alike():
    spec = LinearSpec("amxfp4", 64, 256, INT8, m=16)
    case = Case(spec)
    weight = np.sign(case.dense) * (1 + np.abs(case.dense) % 0.9)  # both extrema in [1, 2)
    case.set_weight(weight.astype(np.float32))
    assert case.error(kernel_func(spec), 16) < TOLERANCE


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("activation", [INT8, OUTLIERS, four_bit("amxfp4")], ids=str)
def test_the_largest_sums_are_exact(activation, sign):
    """Kernels that keep sums in a float32's mantissa have room for all of them."""
    spec = LinearSpec("amxfp4", 32, 256, activation)
    case = Case(spec)
    weight = np.full((32, 256), 10.5 * sign, np.float32)  # 6 * 1.75
    weight[:, ::32] = -weight[:, ::32] / 4  # exponents differ by two: bytes up to 84 + 168
    case.set_weight(weight)
    x = np.ones((33, 256), np.float32)
    x[:, ::32] = -1
    func = kernel_func(spec)
    for x_sign in (1, -1):
        case.draw = lambda m, x_sign=x_sign: x_sign * x[:m]
        for m in (4, 8, 33):
            assert case.error(func, m) < TOLERANCE, f"M={m}"


@pytest.mark.slow
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("name", ["mxfp4", "int4", "int8"])
def test_panels(name, epilogue):
    for n in (64, 96) if epilogue == "silu_mul" else (64, 41):
        spec = LinearSpec(name, n, 96, INT8, **EPILOGUES[epilogue])
        case, func = Case(spec), kernel_func(spec, knobs={"panel_rows": 2, "panel_tiles": 2})
        for m in (1, 2, 19):
            assert case.error(func, m) < TOLERANCE, f"M={m}"


@pytest.mark.parametrize("activation", [INT8, OUTLIERS, FLOAT32], ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("rule", RUNNABLE)
def test_epilogues(rule, epilogue, activation):
    spec = LinearSpec("amxfp4", 64, 96, activation, m_max=FEW, **EPILOGUES[epilogue])
    check(spec, rule, (1, 9))


@pytest.mark.parametrize("n,k", [(16, 32), (1, 33), (17, 63), (100, 257)])
def test_ragged_sizes(n, k):
    for activation in (INT8, FLOAT32):
        spec = LinearSpec("amxfp4", n, k, activation, m_max=FEW, residual=True)
        check(spec, RUNNABLE[0], (1, 5))


@pytest.mark.parametrize("name", ["amxfp4", "int4", "int8", "nvfp4"])
def test_plain_rule(name):
    for activation in (INT8, FLOAT32):
        check(LinearSpec(name, 25, 70, activation), "plain", (1, 6))


@pytest.mark.parametrize("m", [1, 2, 7, 12])
def test_static_rows(m):
    for activation in (INT8, FLOAT32):
        check(LinearSpec("amxfp4", 48, 64, activation, m=m), RUNNABLE[0], (m,))


def test_knobs_change_the_schedule_not_the_result():
    spec = LinearSpec("amxfp4", 48, 64, INT8, m_max=FEW)
    case = Case(spec)
    for knobs in ({"prefetch": 0}, {"rows": 2}, {"rows": 4, "prefetch": 512}):
        assert case.error(kernel_func(spec, knobs=knobs), 3) < TOLERANCE
        assert case.error(kernel_func(spec, knobs=knobs), 9) < limit(spec, RUNNABLE[0], 9)
    with pytest.raises(ValueError, match="prefetch"):
        CpuKnobs.of({"prefetsch": 1})


def test_unknown_target_is_refused():
    spec = LinearSpec("amxfp4", 64, 64, INT8)
    with pytest.raises(TargetError, match="rules asked"):
        linear_kernel(spec, TargetInfo("opencl", "opencl", frozenset()), rule="plain")


def test_a_kernel_says_why():
    kernel = linear_kernel(LinearSpec("amxfp4", 64, 64, INT8), HOST)
    named = "anyllvmtarget" if kernel.rule == "plain" else kernel.rule
    assert kernel.rule in RUNNABLE and named in re.sub("[- ]", "", kernel.why.lower())
    assert isinstance(kernel.func, tvm.tirx.PrimFunc)


def test_float16_results():
    spec = LinearSpec("amxfp4", 57, 64, OUTLIERS, bias=True, out_dtype="float16")
    case, func = Case(spec), kernel_func(spec)
    for m in (1, 3, 8, 40):
        x, args = case.inputs(m)
        bias = case.rng.standard_normal(57).astype(np.float32)
        y = empty((m, 57), "float16")
        func(*tensors(*args, *case.packed, bias), y)
        want = x @ case.dense.T + bias
        assert np.abs(y.numpy() - want).max() < 6e-3 * np.abs(want).max()
