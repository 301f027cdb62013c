"""What activations are: their text, and what they become for a type of x."""

from __future__ import annotations

from dataclasses import replace

import pytest

from amx_tvm.errors import FormatError
from relax_passes.activation import (
    E4M3,
    FLOAT16,
    FLOAT32,
    INT8,
    OUTLIERS,
    Activation,
    four_bit,
    rounded,
)

TEXTS = {
    "float32": FLOAT32,
    "float16": FLOAT16,
    "int8": INT8,
    "int8-outliers": OUTLIERS,
    "fp4:amxfp4": four_bit("amxfp4"),
    "fp4:amxfp4+46": four_bit("amxfp4", four_over_six=True),
    "fp4:amxfp4-e4m3+46-outliers": replace(four_bit("amxfp4-e4m3", True), outliers=True),
    "fake:nvfp4": rounded("nvfp4"),
    "e4m3": E4M3,
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_object_are_each_others_inverse(text):
    assert Activation.parse(text) == TEXTS[text]
    assert str(TEXTS[text]) == text


@pytest.mark.parametrize("text", ["", "int8-outlier", "int8:amxfp4", "fp4:", "fp4", "bf16"])
def test_other_text_is_refused(text):
    with pytest.raises(FormatError, match="known are float32"):
        Activation.parse(text)


def test_what_kernels_compute_it_as():
    assert INT8.computed_in("float32") == OUTLIERS
    assert INT8.computed_in("float16") == FLOAT16
    assert four_bit("amxfp4").computed_in("float32") == four_bit("amxfp4")
    assert four_bit("amxfp4").computed_in("float16") == rounded("amxfp4")
    assert FLOAT32.computed_in("float16") == FLOAT32
    assert E4M3.computed_in("float16") == E4M3
    assert E4M3.computed_in("float32") == OUTLIERS


def test_arrays():
    def names(activation, sums=True):
        return [name for name, _, _ in activation.buffers(64, sums)]

    assert names(INT8, sums=False) == ["codes", "scales"]
    assert names(OUTLIERS) == ["codes", "codes_low", "scales", "sums", "sums_low", "outliers"]
    assert names(four_bit("amxfp4"), sums=False) == ["codes_0", "codes_1", "scales_0", "scales_1"]
    assert names(replace(four_bit("amxfp4"), outliers=True)) == names(OUTLIERS)
    assert E4M3.buffers(64, True) == (("x_codes", (64,), "uint8"), ("x_scales", (), "float32"))
    assert four_bit("nvfp4").buffers(64, True)[1:] == (
        ("scales", (4,), "float32"),
        ("sums", (4,), "int32"),
    )
