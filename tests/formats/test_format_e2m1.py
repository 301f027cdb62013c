"""The E2M1 grid: rounding of single values and the tables that kernels read."""

from __future__ import annotations

import format_reference as reference
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from amx_tvm.formats import e2m1

FLOATS = st.floats(min_value=0, width=32, allow_nan=False, allow_infinity=True)


def near_midpoints() -> np.ndarray:
    """Every midpoint and grid value with the floats just below and above."""
    points = np.array(sorted(e2m1.MIDPOINTS + e2m1.MAGNITUDES), np.float32)
    return np.concatenate(
        [points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(9))]
    )


def test_ties_round_away_from_zero():
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    assert e2m1.round_magnitude(ties).tolist() == [1, 2, 3, 4, 5, 6, 7]
    below = np.nextafter(ties, np.float32(0))
    assert e2m1.round_magnitude(below).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_rounding_equals_both_references_around_every_step():
    for value in near_midpoints():
        index = int(e2m1.round_magnitude(value[None])[0])
        assert index == reference.nearest_away(value, reference.E2M1)
        assert reference.E2M1[index] == reference.mx_round(value, 3, 2, 6.0)


@given(FLOATS)
def test_rounding_equals_both_references(value):
    value = np.float32(value)
    index = int(e2m1.round_magnitude(value[None])[0])
    assert index == reference.nearest_away(value, reference.E2M1)
    if np.isfinite(value):
        assert reference.E2M1[index] == reference.mx_round(value, 3, 2, 6.0)


def test_saturation_and_infinity():
    assert e2m1.round_magnitude(np.array([6, 7, 1e30, np.inf], np.float32)).tolist() == [7] * 4


def test_a_magnitude_that_rounds_to_zero_has_no_sign():
    source = np.array([-0.2, -0.0, 0.0, 0.2, -0.3], np.float32)
    assert e2m1.encode(np.abs(source), source).tolist() == [0, 0, 0, 0, 9]


def test_tables_agree_with_the_values():
    codes = np.arange(16, dtype=np.uint8)
    doubled = 2 * np.array(e2m1.VALUES)
    assert e2m1.signed_doubled(codes).tolist() == doubled.tolist()
    positive, negative = np.array(e2m1.POSITIVE_TABLE), np.array(e2m1.NEGATIVE_TABLE)
    assert (positive - negative).tolist() == doubled.tolist()
    assert (np.array(e2m1.OFFSET_TABLE) - e2m1.OFFSET).tolist() == doubled.tolist()
    assert e2m1.VALUES[8] == 0 and min(e2m1.OFFSET_TABLE) >= 0
