"""Edge cases that every registered format must treat alike: zeros, NaN, Inf, shapes, types."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from amx_tvm import formats
from amx_tvm.errors import FormatError

ALL = formats.names()
RNG = np.random.default_rng(11)


def weights(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.05).astype(np.float32)


@pytest.mark.parametrize("name", ALL)
def test_zeros_give_zero_bytes(name):
    fmt = formats.get(name)
    matrix = np.zeros((3, 70), np.float32)
    matrix[1] = -0.0
    quantized = fmt.quantize(matrix)
    assert all((stored == 0).all() for stored in quantized.scales.values())
    code = fmt.zero_code if isinstance(fmt.zero_code, int) else 0
    assert (quantized.codes == code).all()
    assert (fmt.dequantize(quantized).view(np.uint32) == 0).all()


@pytest.mark.parametrize("name", [n for n in ALL if n.startswith("amxfp4")])
def test_a_sign_that_does_not_occur_has_scale_byte_zero(name):
    quantized = formats.get(name).quantize(np.abs(weights(4, 64)) + 1)
    assert (quantized.scales["negative"] == 0).all() and (quantized.scales["positive"] > 0).all()
    quantized = formats.get(name).quantize(-np.abs(weights(4, 64)) - 1)
    assert (quantized.scales["positive"] == 0).all() and (quantized.scales["negative"] > 0).all()


def test_a_scale_that_rounds_to_zero_flushes_only_its_half():
    matrix = np.zeros((1, 32), np.float32)
    matrix[0, :2] = 6 * np.float32(2.0**-18), -1.0  # below half of E5M2's least 2^-16
    quantized = formats.get("amxfp4").quantize(matrix)
    assert quantized.scales["positive"][0, 0] == 0 and quantized.codes[0, 0] == 0
    assert quantized.codes[0, 1] == 15
    matrix[0, 0] = 6 * np.float32(2.0**-17)  # exactly half: rounds away, to 2^-16
    assert formats.get("amxfp4").quantize(matrix).scales["positive"][0, 0] == 1


@pytest.mark.parametrize("name", ALL)
def test_code_of_minus_zero_is_never_written_and_decodes_to_zero(name):
    fmt = formats.get(name)
    if fmt.code_bits != 4 or name == "int4":
        pytest.skip("the format has no minus zero")
    quantized = fmt.quantize(weights(32, 256) ** 3)
    assert not (quantized.codes == 8).any()
    quantized.codes[:] = 8
    assert (fmt.dequantize(quantized).view(np.uint32) == 0).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_with_name_and_first_index(name, bad):
    matrix = weights(700, 224)
    matrix[640, 101] = matrix[641, 3] = bad
    with pytest.raises(FormatError, match=r"'model.w'.*(nan|inf) at index \(640, 101\)"):
        formats.get(name).quantize(matrix, name="model.w")
    with pytest.raises(FormatError, match=r"\(640, 101\)"):
        formats.quantize_dequantize(name, matrix)
    stacked = matrix.reshape(7, 100, 224)
    with pytest.raises(FormatError, match=r"\(6, 40, 101\)"):
        formats.get(name).quantize(stacked)


def test_the_first_index_is_right_in_rows_longer_than_a_block():
    matrix = np.zeros((2, 200_000), np.float32)
    matrix[0, 199_999] = matrix[1, 5] = np.nan
    with pytest.raises(FormatError, match=r"\(0, 199999\)"):
        formats.get("amxfp4").quantize(matrix)


@pytest.mark.parametrize("name", ALL)
def test_infinite_activations_saturate_and_nan_spoils_its_group_only(name):
    fmt = formats.get(name)
    size = fmt.group_size
    x = weights(3, 4 * size)
    x[0, 1], x[1, 2], x[2, size + 1] = np.inf, -np.inf, np.nan
    y = formats.quantize_dequantize(name, x, activation=True)
    assert np.isfinite(y[:2]).all() and y[0, 1] > 2e3 and y[1, 2] < -2e3
    spoiled = np.isnan(y[2])
    assert spoiled[size : 2 * size].all() and spoiled.sum() == size
    clean = x[2].copy()
    clean[size + 1] = 0
    expected = formats.quantize_dequantize(name, clean[None], activation=True)[0]
    assert (y[2][~spoiled] == expected[~spoiled]).all()
    with pytest.raises(FormatError, match="nan"):
        fmt.quantize(x, activation=True)
    assert (fmt.dequantize(fmt.quantize(x[:2], activation=True)) == y[:2]).all()


@pytest.mark.parametrize("name", ALL)
def test_fewer_columns_than_a_group(name):
    fmt = formats.get(name)
    short = weights(4, fmt.group_size - 1)
    with pytest.raises(FormatError, match=f"{fmt.group_size - 1} columns.*{name}"):
        fmt.quantize(short, name="w")
    padded = np.pad(short, ((0, 0), (0, 1)))
    assert (
        fmt.quantize_dequantize(short, activation=True)
        == fmt.quantize_dequantize(padded, activation=True)[:, :-1]
    ).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("columns", [33, 47, 48, 63, 95])
def test_a_ragged_group_behaves_as_if_padded_with_zeros(name, columns):
    fmt = formats.get(name)
    matrix = weights(5, columns)
    padded = np.pad(matrix, ((0, 0), (0, -columns % 32)))
    ragged, whole = fmt.quantize(matrix), fmt.quantize(padded)
    assert (ragged.codes == whole.codes[:, :columns]).all()
    for key, stored in ragged.scales.items():
        assert stored.shape == (5, -(-columns // fmt.group_size))
        assert (stored == whole.scales[key][:, : stored.shape[1]]).all()


@pytest.mark.parametrize("name", ALL)
def test_leading_axes_and_blocks_do_not_matter(name):
    fmt = formats.get(name)
    array = weights(3, 5, 7, 96)
    quantized = fmt.quantize(array)
    assert quantized.codes.shape == quantized.shape == array.shape
    flat = fmt.quantize(array.reshape(-1, 96))
    assert (quantized.codes.reshape(-1, 96) == flat.codes).all()
    assert (fmt.dequantize(quantized).reshape(-1, 96) == fmt.dequantize(flat)).all()
    row = fmt.quantize(array[0, 0, 0])
    assert row.codes.shape == (96,)
    if not fmt.row_scaled:
        assert (row.codes == quantized.codes[0, 0, 0]).all()
    long_row = weights(1, 70_000)  # longer than one block: the same groups as in short rows
    pieces = long_row[:, :69_984].reshape(-1, 96)
    whole = fmt.quantize(long_row)
    if not fmt.row_scaled:
        assert (whole.codes[0, :69_984] == fmt.quantize(pieces).codes.reshape(-1)).all()
    assert (fmt.dequantize(whole) == fmt.quantize_dequantize(long_row)).all()


@pytest.mark.parametrize("name", ALL)
def test_element_types_and_strides(name):
    fmt = formats.get(name)
    base = weights(64, 96).astype(ml_dtypes.bfloat16)
    expected = fmt.quantize(base.astype(np.float32))
    for array in (base, base.astype(np.float64), np.asfortranarray(base.astype(np.float32))):
        assert (fmt.quantize(array).codes == expected.codes).all()
    integers = np.arange(64).reshape(2, 32) - 20
    assert (fmt.quantize(integers).codes == fmt.quantize(integers.astype(np.float32)).codes).all()


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 32), np.complex64), "complex64"),
        (np.array([["a"] * 32]), "a real array was expected"),
        (np.float32(1), r"shape \(\)"),
        (np.zeros((0, 32), np.float32), r"shape \(0, 32\)"),
        (np.zeros((4, 0), np.float32), r"shape \(4, 0\)"),
    ],
)
def test_what_is_no_real_array_is_refused(array, message):
    with pytest.raises(FormatError, match=message):
        formats.get("amxfp4").quantize(array)


def test_a_float64_beyond_float32_is_refused_as_infinite():
    with pytest.raises(FormatError, match="inf at index"):
        formats.get("amxfp4").quantize(np.full((1, 32), 1e300))


@pytest.mark.parametrize("name", ALL)
def test_the_largest_floats_stay_finite(name):
    largest = np.finfo(np.float32).max
    matrix = np.full((2, 64), largest, np.float32)
    matrix[:, ::2] *= -1
    values = formats.quantize_dequantize(name, matrix)
    assert np.isfinite(values).all() and (values * np.sign(matrix) >= 0).all()
    assert np.abs(values).max() > 2e3


@pytest.mark.parametrize("name", [n for n in ALL if formats.get(n).row_scaled])
def test_tensor_scales(name):
    fmt = formats.get(name)
    matrix = weights(4, 64) * np.array([[1], [10], [100], [1000]], np.float32)
    quantized = fmt.quantize(matrix)
    assert quantized.tensor_scale.shape == ()
    assert quantized.tensor_scale == np.abs(matrix).max() / np.float32(2688)
    rows = fmt.quantize(matrix, activation=True)
    assert rows.tensor_scale.shape == (4,)
    assert (rows.tensor_scale == np.abs(matrix).max(1) / np.float32(2688)).all()
    alone = fmt.quantize(matrix[2:3])
    assert (alone.codes == rows.codes[2]).all()
    given = fmt.quantize(matrix, tensor_scale=rows.tensor_scale)
    assert (fmt.dequantize(given) == fmt.dequantize(rows)).all()
    with pytest.raises(FormatError, match="shape"):
        fmt.quantize(matrix, tensor_scale=np.ones(3, np.float32))
    with pytest.raises(FormatError, match="no tensor scale"):
        formats.get("amxfp4").quantize(matrix, tensor_scale=1.0)
