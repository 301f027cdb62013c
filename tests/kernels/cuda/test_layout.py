"""Layout "cuda-fragment": its picture, round trips over the registry, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm import formats
from amx_tvm.errors import FormatError
from amx_tvm.formats import cuda_layout, packing


def weight(n: int, k: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, k)) * 0.05).astype(np.float32)


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("n,k", [(48, 128), (33, 224), (16, 32)])
def test_round_trip(name, n, k):
    fmt = formats.get(name)
    quantized = fmt.quantize(weight(n, k))
    packed = packing.pack(fmt, quantized, "cuda-fragment")
    restored = packing.unpack(fmt, packed, "cuda-fragment", n, k)
    np.testing.assert_array_equal(restored.codes, quantized.codes)
    for scale in fmt.scale_tensors:
        np.testing.assert_array_equal(restored.scales[scale.name], quantized.scales[scale.name])
    np.testing.assert_array_equal(fmt.dequantize(restored), fmt.dequantize(quantized))
    for key, (shape, dtype) in cuda_layout.shapes(fmt, n, k).items():
        assert packed[key].shape == shape and packed[key].dtype == dtype


def test_e2m1_bits_follow_the_picture():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (32, 128), dtype=np.uint8)
    shape = cuda_layout.shape_of(formats.get("amxfp4"))
    words = cuda_layout.pack_codes(codes, shape).view(np.uint32).reshape(2, 2, 32, 4)
    for row, column in rng.integers(0, [32, 128], (200, 2)):
        tile, h, g = row // 16, row % 16 // 8, row % 8
        unit, step, inside = column // 64, column % 64 // 16, column % 16
        kh, t, e = inside // 8, inside % 8 // 2, inside % 2
        word, i = int(words[tile, unit, 4 * g + t, step]), 2 * kh + h
        magnitude, sign = word >> (16 * e + 9 - 3 * i) & 7, word >> (16 * e + 15 - i) & 1
        assert (sign << 3 | magnitude) == codes[row, column]
        # the two shifts of the kernel put the value at a float16's place
        half = np.uint16((word << 3 * i >> 16 * e & 0x0E00) | (word << i >> 16 * e & 0x8000))
        expected = formats.get("mxfp4").terms[0].table[codes[row, column]] / 2 - 6
        assert half.view(np.float16) * 2.0**14 == expected


def test_plain_float16_round_trip():
    dense = weight(20, 50).astype(np.float16)
    shape = cuda_layout.shape_of(None)
    packed = cuda_layout.pack_float16(dense)["codes"]
    assert packed.shape == shape.codes_shape(20, 50)
    np.testing.assert_array_equal(cuda_layout.unpack_codes(packed, shape, 20, 50), dense)


def test_scales_beyond_float16_registers_are_refused():
    fmt = formats.get("amxfp4")
    large = weight(16, 32)
    large[3, 5] = 6000.0
    with pytest.raises(FormatError, match="leave this layer out"):
        packing.pack(fmt, fmt.quantize(large), "cuda-fragment")
