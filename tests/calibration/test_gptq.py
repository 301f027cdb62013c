"""GPTQ by itself: feedback, order, correction, and what it stores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from amx_tvm import formats
from amx_tvm.calibration.gptq import Statistics, corrected, gptq, output_error, plain
from amx_tvm.calibration.grids import grid_of


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [48, 96] and inputs [512, 96] whose channels depend on each other."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(96, 96, generator=generator) / 8 + torch.eye(96)
    inputs = torch.randn(512, 96, generator=generator) @ mix
    inputs[:, 7] *= 12
    return torch.randn(48, 96, generator=generator), inputs


@pytest.mark.parametrize("name", ["amxfp4", "amxfp4-e4m3-tensor", "mxfp4", "nvfp4", "int4", "int8"])
@pytest.mark.parametrize("search", ["none", "diagonal", "joint"])
def test_stored_form_is_the_rounded_values(layer, name, search):
    weight, inputs = layer
    result = gptq(weight, grid_of(name), inputs.T @ inputs, search=search)
    stored = formats.get(name).dequantize(result.quantized)
    np.testing.assert_allclose(stored, result.values.numpy(), rtol=1e-6, atol=1e-7)
    assert (
        result.quantized.codes.dtype == np.uint8
        and result.quantized.codes.max() < 2 ** formats.get(name).code_bits
    )


@pytest.mark.parametrize("name", ["amxfp4", "nvfp4", "int4", "int8"])
def test_feedback_lowers_the_output_error(layer, name):
    weight, inputs = layer
    hessian = inputs.T @ inputs
    rounded = plain(weight, grid_of(name), hessian, search=False)
    better = gptq(weight, grid_of(name), hessian)
    exact = (inputs @ weight.T).square().sum()
    got = (inputs @ (weight - better.values).T).square().sum() / exact
    assert better.error == pytest.approx(got.item(), rel=1e-3)
    assert better.error < 0.75 * rounded.error


def test_uncorrelated_inputs_leave_nothing_to_feed_back(layer):
    weight, _ = layer
    grid, hessian = grid_of("amxfp4"), torch.eye(96)
    result = gptq(weight, grid, hessian, search="none")
    np.testing.assert_array_equal(result.values, plain(weight, grid, hessian, False).values)


def test_inputs_that_never_occur(layer):
    weight, inputs = layer
    inputs[:, 32:64] = 0
    result = gptq(weight, grid_of("amxfp4"), inputs.T @ inputs)
    assert torch.isfinite(result.values).all() and result.error < 0.02


def test_correction_undoes_a_systematic_error_of_the_inputs(layer):
    weight, inputs = layer
    seen = inputs * 0.9  # what earlier rounding did to the inputs
    statistics = Statistics.empty(96, mixed=True)
    for part in range(0, 512, 128):
        statistics.add(seen[part : part + 128], inputs[part : part + 128])
    assert statistics.tokens == 512
    half = corrected(weight, statistics, 1e-6, 0.5)
    full = corrected(weight, statistics, 1e-6, 1.0)
    torch.testing.assert_close(full, weight / 0.9, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(half, (weight + weight / 0.9) / 2, rtol=1e-3, atol=1e-3)
    assert corrected(weight, statistics, 0.01, 0) is weight


def test_output_error_of_nothing():
    zero = torch.zeros(4, 8)
    assert output_error(zero, zero, torch.eye(8)) == 0
