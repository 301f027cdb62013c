"""Packed layouts: the byte every value lands on, and that unpacking restores the data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amx_tvm import formats
from amx_tvm.errors import FormatError
from amx_tvm.formats import packing

PAIRS = [(layout, name) for name in formats.names() for layout in packing.layouts(name)]
SHAPES = [(16, 32), (48, 96), (17, 33), (1, 32), (31, 95), (64, 576)]


def quantized(name: str, n: int, k: int, seed: int = 0) -> formats.Quantized:
    weight = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    return formats.get(name).quantize(weight)


def assert_same(one: formats.Quantized, other: formats.Quantized) -> None:
    assert (one.codes == other.codes).all() and one.codes.shape == other.codes.shape
    assert one.scales.keys() == other.scales.keys()
    for key, stored in one.scales.items():
        assert stored.dtype == other.scales[key].dtype and (stored == other.scales[key]).all()


@pytest.mark.parametrize("layout, name", PAIRS)
@pytest.mark.parametrize("n, k", SHAPES)
def test_round_trip_and_shapes(layout, name, n, k):
    fmt, data = formats.get(name), quantized(name, n, k)
    arrays = packing.pack(fmt, data, layout)
    shapes = {key: (array.shape, str(array.dtype)) for key, array in arrays.items()}
    assert shapes == packing.part_shapes(name, (n, k), layout)
    scale = "row_scale" if layout == "plain" else "tile_scale"
    assert (scale in arrays) == fmt.row_scaled
    assert all(array.flags.c_contiguous for array in arrays.values())
    back = packing.unpack(name, arrays, layout, n, k)
    assert_same(back, data)
    assert (fmt.dequantize(back) == fmt.dequantize(data)).all()


@settings(max_examples=40)
@given(
    pair=st.sampled_from(PAIRS),
    n=st.integers(1, 40),
    k=st.integers(32, 130),
    seed=st.integers(0, 99),
)
def test_round_trip_of_any_shape(pair, n, k, seed):
    layout, name = pair
    data = quantized(name, n, k, seed)
    assert_same(packing.unpack(name, packing.pack(name, data, layout), layout, n, k), data)


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("n, k", SHAPES)
def test_tile16x32_byte_by_byte(name, n, k):
    """Every code and scale byte lies where the layout's description says."""
    fmt, data = formats.get(name), quantized(name, n, k)
    arrays = packing.pack(fmt, data, "tile16x32")
    sub = 32 // fmt.group_size
    for row in range(n):
        tile, r = divmod(row, 16)
        for column in range(k):
            unit, c = divmod(column, 32)
            if fmt.code_bits == 4:
                byte = int(arrays["codes"][tile, unit, c // 8 * 64 + r * 4 + c % 4])
                code = byte >> 4 if c % 8 >= 4 else byte & 15
            else:
                code = int(arrays["codes"][tile, unit, c // 4 * 64 + r * 4 + c % 4])
            assert code == data.codes[row, column]
        for group in range(data.scales[fmt.scale_tensors[0].name].shape[1]):
            unit, s = divmod(group, sub)
            base = 0
            for tensor in fmt.scale_tensors:
                first = base + (s * 16 + r) * tensor.bytes
                stored = arrays["scales"][tile, unit, first : first + tensor.bytes]
                value = data.scales[tensor.name][row, group]
                assert stored.tobytes() == value.astype(np.dtype(tensor.dtype)).tobytes()
                base += sub * 16 * tensor.bytes


@pytest.mark.parametrize("layout, name", PAIRS)
def test_padding_has_value_zero(layout, name):
    """Reading the padding as if it were data gives zeros in padding columns and rows."""
    fmt, (n, k) = formats.get(name), (5, 45)
    arrays = packing.pack(fmt, quantized(name, n, k), layout)
    rows = 16 if layout == "tile16x32" else n
    if packing.part_shapes(name, (rows, 64), layout) != packing.part_shapes(name, (n, k), layout):
        pytest.skip("this layout pads in units of its own")
    values = fmt.dequantize(packing.unpack(name, arrays, layout, rows, 64))
    assert (values[:, k:] == 0).all() and (values[n:] == 0).all()
    assert (values[:n, :k] != 0).any()


@pytest.mark.parametrize("name", [n for n in formats.names() if formats.get(n).row_scaled])
def test_stacked_parts_keep_their_own_tensor_scale(name):
    fmt = formats.get(name)
    small = np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32)
    parts = [fmt.quantize(small * 0.01), fmt.quantize(small * 100)]
    whole = formats.concatenate(parts)
    values = fmt.dequantize(whole)
    assert (values == np.concatenate([fmt.dequantize(part) for part in parts])).all()
    arrays = packing.pack(fmt, whole, "tile16x32")
    assert arrays["tile_scale"].tolist() == [float(part.tensor_scale) for part in parts]
    back = packing.unpack(fmt, arrays, "tile16x32", 32, 64)
    assert (fmt.dequantize(back) == values).all()
    ragged = formats.concatenate([fmt.quantize(small[:9] * 0.01), fmt.quantize(small * 100)])
    with pytest.raises(FormatError, match="rows 0 to 15 .* multiples of 16"):
        packing.pack(fmt, ragged, "tile16x32")


@pytest.mark.parametrize("layout", [n for n in packing.layouts("amxfp4") if n != "plain"])
@pytest.mark.parametrize("name", ["amxfp4", "amxfp4-e4m3-tensor", "nvfp4"])
def test_stored_bits_with_tensor_scales_stay_under_4_51(name, layout):
    n, k = 960, 576  # q, k and v of SmolLM2-135M in one
    arrays = packing.pack(name, quantized(name, n, k), layout)
    table = arrays.pop("table", None)  # of E4M3's layout: as long for a weight of any size
    assert table is None or (table.nbytes == 2052 and layout == "cuda-fragment-e4m3")
    assert 8 * sum(array.nbytes for array in arrays.values()) / (n * k) <= 4.51


@pytest.mark.parametrize("name", formats.names())
def test_stacking_equals_quantizing_together_without_a_tensor_scale(name):
    fmt = formats.get(name)
    weight = np.random.default_rng(4).standard_normal((24, 64)).astype(np.float32)
    whole = formats.concatenate([fmt.quantize(weight[:9]), fmt.quantize(weight[9:])])
    if not fmt.row_scaled:
        assert_same(whole, fmt.quantize(weight))
    assert whole.shape == (24, 64)
    with pytest.raises(FormatError, match="columns must agree"):
        formats.concatenate([whole, fmt.quantize(weight[:, :32])])


def test_bad_requests_are_refused():
    data = quantized("amxfp4", 16, 64)
    with pytest.raises(FormatError, match="unknown packed layout 'rows'.*plain, tile16x32"):
        packing.pack("amxfp4", data, "rows")
    with pytest.raises(FormatError, match="cannot be packed as mxfp4"):
        packing.pack("mxfp4", data)
    with pytest.raises(FormatError, match="cuda-fragment-e4m3 does not hold int4; its layouts are"):
        packing.pack("int4", quantized("int4", 16, 64), "cuda-fragment-e4m3")
    with pytest.raises(FormatError, match="only matrices"):
        packing.pack("amxfp4", formats.get("amxfp4").quantize(np.ones((2, 2, 32))))
    arrays = packing.pack("amxfp4", data)
    with pytest.raises(FormatError, match="holds codes as uint8"):
        packing.unpack("amxfp4", arrays, "plain", 15, 64)
    with pytest.raises(FormatError, match="got nothing"):
        packing.unpack("amxfp4", {"codes": arrays["codes"]}, "plain", 16, 64)


@pytest.mark.parametrize("layout", packing.layouts("amxfp4"))
def test_a_reader_refuses_reserved_scales(layout):
    arrays = packing.pack("amxfp4", quantized("amxfp4", 16, 64), layout)
    arrays["scales"].reshape(-1)[0] = 0x7C
    with pytest.raises(FormatError, match="0x7c"):
        packing.unpack("amxfp4", arrays, layout, 16, 64)
    data = quantized("amxfp4", 16, 64)
    data.scales["negative"][3, 1] = 0x7F
    with pytest.raises(FormatError, match=r"'negative' holds .* at group \(3, 1\)"):
        packing.pack("amxfp4", data, layout)
    with pytest.raises(FormatError, match="0x7f"):
        formats.get("amxfp4").dequantize(data)


def test_a_layout_registers_itself_and_its_name_is_taken_once():
    layout = packing.get_layout("plain")
    with pytest.raises(ValueError, match="registered twice"):
        packing.register_layout(layout)
    twin = packing.Layout("twin of plain", layout.pack, layout.unpack, layout.shapes)
    packing.register_layout(twin)
    try:
        data = quantized("nvfp4", 8, 64)
        arrays = packing.pack("nvfp4", data, "twin of plain")
        assert_same(packing.unpack("nvfp4", arrays, "twin of plain", 8, 64), data)
    finally:
        packing._LAYOUTS.pop("twin of plain")
