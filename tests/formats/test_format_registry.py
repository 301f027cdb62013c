"""The registry, and what every registered format says of itself."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from amx_tvm import formats
from amx_tvm.errors import AmxError, FormatError


def test_the_promised_names_exist_with_their_bits():
    bits = {row.name: row.bits_per_value for row in formats.summary()}
    assert bits["amxfp4"] == 4.5 and bits["mxfp4"] == 4.25 and bits["nvfp4"] == 4.5
    assert bits["int4"] == 4.75 and bits["int8"] == 8.5 and bits["mxfp4-e5m2"] == 4.25
    for variant in ("e4m3", "e4m3-tensor", "pot", "pot-r"):
        assert bits[f"amxfp4-{variant}"] == 4.5
    assert formats.names()[0] == "amxfp4"


def test_summary_tells_the_scales():
    rows = {row.name: row for row in formats.summary()}
    assert rows["amxfp4"].scales == "positive E5M2, negative E5M2"
    assert rows["nvfp4"].tensor_scale and rows["nvfp4"].group_size == 16


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(FormatError, match="'fp3'.*amxfp4, .*int8") as caught:
        formats.get("fp3")
    assert isinstance(caught.value, AmxError) and "\n" not in str(caught.value)


def test_a_format_passes_through_get_and_a_name_is_taken_once():
    fmt = formats.get("amxfp4")
    assert formats.get(fmt) is fmt
    with pytest.raises(ValueError, match="registered twice"):
        formats.register(fmt)


def test_the_480_variant_is_not_registered():
    assert not any("480" in name for name in formats.names())


@pytest.mark.parametrize("name", formats.names())
def test_terms_are_small_unsigned_tables_over_known_scales(name):
    fmt = formats.get(name)
    assert fmt.name == name and fmt.code_bits in (4, 8)
    scales = {tensor.name for tensor in fmt.scale_tensors}
    for term in fmt.terms:
        assert term.scale in scales
        assert isinstance(term.offset, int) or term.offset in scales
        if term.table is None:
            assert fmt.code_bits == 8
        else:
            assert len(term.table) == 16 and 0 <= min(term.table) <= max(term.table) <= 127


@pytest.mark.parametrize("name", formats.names())
def test_decode_equals_its_terms(name):
    """A format may decode faster than by its terms, never differently."""
    fmt = formats.get(name)
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 1 << fmt.code_bits, (5, 3, fmt.group_size)).astype(np.uint8)
    stored = {}
    for tensor in fmt.scale_tensors:
        if tensor.dtype == "float16":
            stored[tensor.name] = rng.random((5, 3)).astype(np.float16)
        else:
            stored[tensor.name] = rng.integers(0, tensor.type.largest + 1, (5, 3), np.uint8)
    scale = rng.random((5, 1)).astype(np.float32) if fmt.row_scaled else None
    total = np.zeros(codes.shape, np.float64)
    for term in fmt.terms:
        numbers = codes if term.table is None else np.array(term.table)[codes]
        offset = stored[term.offset] if isinstance(term.offset, str) else np.array(term.offset)
        factor = term.factor * fmt.decode_scale(term.scale, stored[term.scale]).astype(np.float64)
        total += factor[..., None] * (numbers.astype(int) - offset.astype(int)[..., None])
    expected = total.astype(np.float32)
    assert (expected == total).all()  # exact in float32, so kernels may sum in any order
    if scale is not None:
        expected = expected * scale[..., None]
    assert (fmt.decode(codes, stored, scale) == expected).all()
    assert (formats.Format.decode(fmt, codes, stored, scale) == expected).all()


@pytest.mark.parametrize("name", formats.names())
def test_given_scales_can_be_encoded_with(name):
    """Recipes choose scales themselves: the format's own scales must give the format's codes."""
    fmt = formats.get(name)
    matrix = np.random.default_rng(3).standard_normal((4, 2 * fmt.group_size)).astype(np.float32)
    quantized = fmt.quantize(matrix)
    scale = None
    if fmt.row_scaled:
        scale = np.full((4, 1), quantized.tensor_scale)
    codes = fmt.encode(matrix.reshape(4, 2, -1), quantized.scales, scale)
    assert (codes.reshape(4, -1) == quantized.codes).all()


def test_a_scale_tensor_that_does_not_exist():
    with pytest.raises(FormatError, match="'zero'.*positive, negative"):
        formats.get("amxfp4").decode_scale("zero", np.zeros(1, np.uint8))


def test_the_package_needs_numpy_only():
    code = (
        "import sys, amx_tvm.formats as f; f.get('amxfp4'); "
        "print([m for m in ('tvm', 'tvm_ffi', 'torch', 'ml_dtypes') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
