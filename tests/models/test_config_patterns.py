"""Which layers slide, as configurations say it."""

from __future__ import annotations

import pytest

from amx_tvm.errors import ModelError
from amx_tvm.models.config import FULL, SLIDING
from amx_tvm.models.config_reader import ConfigReader

L, G = SLIDING, FULL


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({}, [L, L, G, L, L]),
        ({"sliding_window_pattern": 2}, [L, G, L, G, L]),
        ({"sliding_window_pattern": "LLG"}, [L, L, G, L, G]),  # the last is full
        ({"sliding_window_pattern": 2, "layer_types": [G] * 5}, [G] * 5),
    ],
)
def test_patterns(fields, kinds):
    assert ConfigReader({"num_hidden_layers": 5, **fields}).sliding_pattern(3) == kinds


@pytest.mark.parametrize("pattern", ["", "LLX"])
def test_letters_that_mean_nothing(pattern):
    read = ConfigReader({"num_hidden_layers": 5, "sliding_window_pattern": pattern})
    with pytest.raises(ModelError, match="L .sliding. and G"):
        read.sliding_pattern(3)
