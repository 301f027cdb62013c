"""Weights as E4M3 numbers: the table of a weight, its layout, and rows of x."""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm import formats
from amx_tvm.formats import e4m3, packing
from amx_tvm.formats.scales import E4M3

NAMES = [name for name in formats.names() if e4m3.holds(formats.get(name))]
# Largest relative error of a weight's numbers: half a step of three bits, where scales have more
# than the format's own two bits.
STEP = 2.0**-4


def weight(n: int = 48, k: int = 256, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, k)) * 0.05).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_nearest(name):
    """Every number is E4M3's nearest to the format's own, times one power of two."""
    fmt = formats.get(name)
    quantized = fmt.quantize(weight())
    factor = float(e4m3.table(fmt, quantized.scales)[e4m3.FACTOR :].view(np.float32)[0])
    assert np.log2(factor) == int(np.log2(factor))
    exact, got = fmt.dequantize(quantized), e4m3.decoded(quantized)
    if quantized.tensor_scale is not None:
        factor *= float(quantized.tensor_scale)
    grid = np.unique(np.concatenate([E4M3.values[:0x7F], -E4M3.values[:0x7F]])).astype(np.float64)
    scaled = exact.astype(np.float64).reshape(-1) / factor
    place = np.clip(np.searchsorted(grid, scaled), 1, len(grid) - 1)
    nearest = np.minimum(np.abs(grid[place] - scaled), np.abs(grid[place - 1] - scaled))
    error = np.abs(got.astype(np.float64).reshape(-1) / factor - scaled)
    np.testing.assert_allclose(error, nearest, atol=1e-6 * np.abs(scaled).max())
    assert np.abs(scaled).max() <= e4m3.LARGEST_E4M3


def test_of_amxfp4_one_product_is_rounded():
    """1.75 * 1.5 alone; with powers of two as scales none."""
    values = {}
    for name in ("amxfp4", "mxfp4"):
        quantized = formats.get(name).quantize(weight())
        exact, got = formats.get(name).dequantize(quantized), e4m3.decoded(quantized)
        values[name] = np.abs(exact[exact != got])
    assert not values["mxfp4"].size
    mantissas = np.frexp(values["amxfp4"])[0]
    assert set(mantissas * 2) == {1.3125}  # 2.625


@pytest.mark.parametrize("span", [1, 10, 14, 40])
def test_small_scales_err_by_no_more_than_a_subnormal(span):
    x = weight()
    x[:, 32:64] *= np.float32(2.0**-span)
    quantized = formats.get("amxfp4").quantize(x)
    exact, got = quantized.format.dequantize(quantized), e4m3.decoded(quantized)
    bound = np.maximum(np.abs(exact) * STEP, 2.0**-17 * np.abs(exact).max())
    assert (np.abs(exact - got) <= bound).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(48, 256), (20, 80)])
def test_layout_keeps_the_weight(name, size):
    fmt = formats.get(name)
    quantized = fmt.quantize(weight(*size))
    packed = packing.pack(fmt, quantized, e4m3.LAYOUT)
    shapes = packing.part_shapes(fmt, size, e4m3.LAYOUT)
    assert {k: (a.shape, str(a.dtype)) for k, a in packed.items()} == shapes
    restored = packing.unpack(fmt, packed, e4m3.LAYOUT, *size)
    np.testing.assert_array_equal(fmt.dequantize(restored), fmt.dequantize(quantized))


def test_a_weight_of_zeros_has_a_table():
    quantized = formats.get("amxfp4").quantize(np.zeros((16, 64), np.float32))
    assert not e4m3.decoded(quantized).any()


def test_rows_of_x_are_rounded_to_the_nearest():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 64)) * np.exp2(rng.integers(-20, 3, (5, 64)))
    x[3] = 0
    x = x.astype(np.float16)
    numbers, scales = e4m3.round_rows(x)
    assert scales[3] == 0 and not numbers[3].any()
    assert (np.abs(numbers).max(1)[scales > 0] == e4m3.LARGEST_E4M3).all()
    np.testing.assert_array_equal(E4M3.values[E4M3.encode(np.abs(numbers))], np.abs(numbers))
    error = np.abs(numbers * scales[:, None] - x)
    bound = np.maximum(np.abs(x).astype(np.float32) * STEP, scales[:, None] * 2.0**-10)
    assert (error <= bound * 1.0001).all()
