"""Scale types: every byte decodes as its definition says, every rounding is nearest, ties away."""

from __future__ import annotations

import format_reference as reference
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amx_tvm.errors import FormatError
from amx_tvm.formats import scales

POSITIVE = st.floats(min_value=0, width=32, allow_nan=False, allow_infinity=False)
MINIFLOATS = [
    (scales.E5M2, reference.E5M2, 4, 5, 57344.0),
    (scales.E4M3, reference.E4M3, 5, 4, 448.0),
    (scales.E4M3_480, reference.E4M3_480, 5, 4, 480.0),
]


@pytest.mark.parametrize("kind, grid, bits, exponent_bits, largest", MINIFLOATS)
def test_every_byte_decodes_to_its_definition(kind, grid, bits, exponent_bits, largest):
    stored = np.arange(len(grid), dtype=np.uint8)
    assert kind.decode(stored).tolist() == grid
    assert grid[-1] == largest
    assert (kind.encode(kind.decode(stored)) == stored).all()


@pytest.mark.parametrize(
    "kind, other", [(scales.E5M2, ml_dtypes.float8_e5m2), (scales.E4M3, ml_dtypes.float8_e4m3fn)]
)
def test_decode_equals_ml_dtypes(kind, other):
    stored = np.arange(kind.largest + 1, dtype=np.uint8)
    assert (kind.decode(stored) == stored.view(other).astype(np.float32)).all()


@pytest.mark.parametrize("kind, grid, bits, exponent_bits, largest", MINIFLOATS)
def test_rounding_around_every_midpoint(kind, grid, bits, exponent_bits, largest):
    middles = np.array([(a + b) / 2 for a, b in zip(grid, grid[1:], strict=False)], np.float32)
    assert kind.encode(middles).tolist() == list(range(1, len(grid)))  # ties away
    below = np.nextafter(middles, np.float32(0))
    assert kind.encode(below).tolist() == list(range(len(grid) - 1))
    for value in (*middles, *below):
        rounded = reference.mx_round(value, bits, exponent_bits, largest)
        assert float(kind.decode(kind.encode(value[None]))[0]) == rounded


@pytest.mark.parametrize("kind, grid, bits, exponent_bits, largest", MINIFLOATS)
@given(value=POSITIVE)
def test_rounding_equals_both_references(kind, grid, bits, exponent_bits, largest, value):
    value = np.float32(value)
    byte = int(kind.encode(value[None])[0])
    assert byte == reference.nearest_away(value, grid)
    assert grid[byte] == reference.mx_round(value, bits, exponent_bits, largest)


def test_saturation():
    assert scales.E5M2.encode(np.array([6e4, 1e38, np.inf], np.float32)).tolist() == [0x7B] * 3
    assert scales.E4M3.encode(np.array([464, 1e38, np.inf], np.float32)).tolist() == [0x7E] * 3
    assert scales.E4M3_480.encode(np.array([480, 1e38], np.float32)).tolist() == [0x7F] * 2
    assert scales.FLOAT16.encode(np.array([7e4, np.inf], np.float32)).tolist() == [65504] * 2


@given(value=POSITIVE)
def test_power_of_two_rules(value):
    value = np.float32(value)
    for round_up in (False, True):
        byte = int(scales.POWER_OF_TWO.encode(value[None], round_up)[0])
        assert byte == reference.pot(value, round_up)


def test_power_of_two_rounds_up_from_a_mantissa_of_seven_quarters():
    value = np.array([1.75, np.nextafter(np.float32(1.75), np.float32(0)), 2], np.float32)
    assert scales.POWER_OF_TWO.encode(value).tolist() == [125, 125, 126]
    assert scales.POWER_OF_TWO.encode(value, round_up=True).tolist() == [126, 125, 126]


def test_power_of_two_decodes_exactly_and_stays_in_float32():
    stored = np.arange(255, dtype=np.uint8)
    assert scales.POWER_OF_TWO.decode(stored).tolist() == [2.0 ** (b - 127) for b in range(255)]
    largest = np.array([np.finfo(np.float32).max], np.float32)
    for round_up in (False, True):
        byte = scales.POWER_OF_TWO.encode(largest, round_up)
        assert np.isfinite(np.float32(6) * scales.POWER_OF_TWO.decode(byte))[0]


@given(st.floats(-4e6, 4e6, width=32))
def test_round_away(value):
    assert scales.round_away(np.array([value], np.float32))[0] == reference.round_away(value)


def test_round_away_at_halves_and_beside_them():
    halves = np.arange(0.5, 4000, 1, dtype=np.float32)
    assert (scales.round_away(halves) == np.ceil(halves)).all()
    assert (scales.round_away(np.nextafter(halves, np.float32(0))) == np.floor(halves)).all()
    assert (scales.round_away(-halves) == -np.ceil(halves)).all()


@pytest.mark.parametrize(
    "kind, stored",
    [
        (scales.E5M2, np.array([[1, 0x7C]], np.uint8)),
        (scales.E4M3, np.array([[1, 0x7F]], np.uint8)),
        (scales.POWER_OF_TWO, np.array([[1, 0xFF]], np.uint8)),
        (scales.ZERO_POINT, np.array([[1, 16]], np.uint8)),
        (scales.FLOAT16, np.array([[1, np.inf]], np.float16)),
        (scales.FLOAT16, np.array([[1, -1]], np.float16)),
    ],
)
def test_reserved_scales_are_refused_with_their_place(kind, stored):
    with pytest.raises(FormatError, match=r"tensor x holds .* at group \(0, 1\)"):
        kind.check(stored, "tensor x")
    kind.check(stored[:, :1], "tensor x")
