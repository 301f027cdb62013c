"""Linears that quantize their own result, against the linear and the quantization apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cpu_oracle import Case, compile_func, empty, kernel_func, tensors

from amx_tvm import formats
from relax_passes.schedules.cpu import activations, follow
from relax_passes.schedules.spec import OUTLIERS, LinearSpec, NextActivation

ROWS = (1, 3, 8, 16, 17, 40)  # in one region up to 16, one behind another after that
FORMATS = [
    pytest.param(name, marks=[] if name in ("amxfp4", "int8") else pytest.mark.slow)
    for name in formats.names()
]


def check(spec):
    """Compare all results bit for bit; what is not listed as an outlier is not read."""
    func, apart = kernel_func(spec), kernel_func(replace(spec, follow=None))
    f, k = spec.follow, spec.out_features
    quantize = compile_func(activations.quantize(k, None, f.scheme, f.sums, f.prologue, f.eps))
    case = Case(spec)
    weight = case.rng.standard_normal(k).astype(np.float32)
    norm = [weight] if f.prologue == "rms_norm" else []
    for m in ROWS:
        _, args = case.inputs(m)
        args = [*args, *case.packed]
        if spec.residual:
            args.append(case.rng.standard_normal((m, k)).astype(np.float32))
        want_y, y = empty((m, k)), empty((m, k))
        apart(*tensors(*args), want_y)
        want, got = (
            [empty((m, *shape), dtype) for _, shape, dtype in spec.next_buffers()] for _ in range(2)
        )
        quantize(want_y, *tensors(*norm), *want)
        func(*tensors(*args, *norm), y, *got)
        np.testing.assert_array_equal(y.numpy(), want_y.numpy())
        for (name, _, _), a, b in zip(spec.next_buffers(), got, want, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=f"{name}, M={m}")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name):
    check(LinearSpec(name, 96, 64, OUTLIERS, follow=NextActivation(OUTLIERS)))


@pytest.mark.parametrize("scheme", [OUTLIERS, "int8", "fp4:amxfp4"])
def test_norm_behind_the_residual(scheme):
    then = NextActivation(scheme, "rms_norm", 1e-5)
    check(LinearSpec("amxfp4", 80, 64, scheme, residual=True, follow=then))


def test_silu_mul():
    check(LinearSpec("amxfp4", 192, 64, OUTLIERS, silu_mul=True, follow=NextActivation(OUTLIERS)))


def test_which_linears():
    spec = LinearSpec("amxfp4", 64, 64, OUTLIERS, follow=NextActivation(OUTLIERS))
    assert follow.supports(spec)
    for other in (
        replace(spec, follow=None),
        replace(spec, m=1),  # one row is quantized sooner than threads meet
        replace(spec, experts=4),
        replace(spec, activation="float32"),
        replace(spec, follow=NextActivation(OUTLIERS, "silu_mul")),
    ):
        assert not follow.supports(other)


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
