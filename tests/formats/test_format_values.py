"""Codes, scales and values of every format equal the literal reference, bit for bit."""

from __future__ import annotations

import format_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from amx_tvm import formats
from amx_tvm.formats.amxfp4 import AMXFP4_E4M3_480

MATRICES = reference.awkward_matrices()
FP4 = {name: formats.get(name) for name in reference.FP4 if name in formats.names()}
FP4["amxfp4-e4m3-480"] = AMXFP4_E4M3_480

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
# One scale of values for the whole matrix and free values in between: both happen in weights.
ANY_MATRIX = st.one_of(
    npst.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(32, 70)), elements=FINITE),
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(32, 70)),
        elements=st.floats(-1, 1, width=32),
    ),
)


def bits(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.uint32)


def check_fp4(fmt: formats.Format, matrix: np.ndarray) -> None:
    codes, scales, tensor, values = reference.quantize_fp4(fmt.name, matrix)
    quantized = fmt.quantize(matrix)
    for key, stored in scales.items():
        np.testing.assert_array_equal(quantized.scales[key], stored)
    np.testing.assert_array_equal(quantized.codes, codes)
    if tensor is None:
        assert quantized.tensor_scale is None
    else:
        assert bits(quantized.tensor_scale) == bits(tensor)
    np.testing.assert_array_equal(bits(fmt.dequantize(quantized)), bits(values))
    np.testing.assert_array_equal(bits(fmt.quantize_dequantize(matrix)), bits(values))


@pytest.mark.parametrize("case", MATRICES)
@pytest.mark.parametrize("name", FP4)
def test_fp4_on_awkward_matrices(name, case):
    check_fp4(FP4[name], MATRICES[case])


@pytest.mark.parametrize("name", FP4)
@settings(max_examples=25)
@given(matrix=ANY_MATRIX)
def test_fp4_on_any_matrix(name, matrix):
    check_fp4(FP4[name], matrix)


def check_int4(matrix: np.ndarray) -> None:
    codes, scale, zero = reference.quantize_int4(matrix)
    quantized = formats.get("int4").quantize(matrix)
    np.testing.assert_array_equal(quantized.scales["scale"], scale)
    np.testing.assert_array_equal(quantized.scales["zero"], zero)
    np.testing.assert_array_equal(quantized.codes, codes)
    values = np.repeat(scale.astype(np.float64), 32, 1)[:, : matrix.shape[1]] * (
        codes.astype(int) - np.repeat(zero.astype(int), 32, 1)[:, : matrix.shape[1]]
    )
    np.testing.assert_array_equal(formats.get("int4").dequantize(quantized), values)


def check_int8(matrix: np.ndarray) -> None:
    codes, scale = reference.quantize_int8(matrix)
    quantized = formats.get("int8").quantize(matrix)
    np.testing.assert_array_equal(quantized.scales["scale"], scale)
    np.testing.assert_array_equal(quantized.codes, codes)
    values = np.repeat(scale.astype(np.float64), 32, 1)[:, : matrix.shape[1]] * (
        codes.astype(int) - 128
    )
    np.testing.assert_array_equal(formats.get("int8").dequantize(quantized), values)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the reference's own max - min
@pytest.mark.parametrize("check", [check_int4, check_int8])
@pytest.mark.parametrize("case", MATRICES)
def test_integers_on_awkward_matrices(check, case):
    check(MATRICES[case])


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("check", [check_int4, check_int8])
@settings(max_examples=25)
@given(matrix=ANY_MATRIX)
def test_integers_on_any_matrix(check, matrix):
    check(matrix)


def test_a_worked_example_of_amxfp4():
    """By hand: positive scale E5M2(12/6) = 2, negative E5M2(0.6/6) = 0.09375 (0x2E)."""
    group = np.zeros((1, 32), np.float32)
    group[0, :6] = [12, 3, 1, -0.6, -0.3, -0.02]
    quantized = formats.get("amxfp4").quantize(group)
    assert quantized.scales == {"positive": np.array([[0x40]]), "negative": np.array([[0x2E]])}
    assert quantized.codes[0, :6].tolist() == [7, 3, 1, 15, 8 + 5, 0]
    values = formats.get("amxfp4").dequantize(quantized)
    assert values[0, :6].tolist() == [12, 3, 1, -0.5625, -0.28125, 0]


def test_amxfp4_values_are_exact_in_bfloat16_and_float16():
    rng = np.random.default_rng(5)
    values = formats.quantize_dequantize("amxfp4", rng.standard_normal((64, 256)))
    assert (values.astype(np.float16) == values).all()
    assert ((values.view(np.uint32) & 0xFFFF) == 0).all()  # bfloat16 is float32's upper half


def test_int8_is_lossless_on_the_grid_of_gguf_q8_0():
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    weight = (np.random.default_rng(6).standard_normal((64, 576)) * 0.05).astype(np.float32)
    blocks = gguf.quants.quantize(weight, kind)
    on_grid = gguf.quants.dequantize(blocks, kind)
    quantized = formats.get("int8").quantize(on_grid)
    assert (formats.get("int8").dequantize(quantized) == on_grid).all()
    stored = blocks.reshape(64, 18, 34)  # Q8_0: float16 scale, then 32 int8
    assert (stored[..., :2].copy().view(np.float16)[..., 0] == quantized.scales["scale"]).all()
    q = stored[..., 2:].reshape(64, 576).view(np.int8).astype(np.int16)
    assert (q + 128 == quantized.codes).all()


def test_errors_rank_as_the_formats_promise():
    """On Gaussian weights a second scale and a finer scale each help."""
    weight = np.random.default_rng(7).standard_normal((256, 1024)).astype(np.float32)

    def error(name: str) -> float:
        return float(np.mean((formats.quantize_dequantize(name, weight) - weight) ** 2))

    assert error("amxfp4") < error("amxfp4-pot-r") < error("amxfp4-pot")
    assert error("amxfp4-e4m3-tensor") < error("amxfp4") < error("mxfp4-e5m2") < error("mxfp4")
    assert error("int8") < 0.01 * error("nvfp4")
