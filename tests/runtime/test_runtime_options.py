"""Options: None is the default, equal numbers are equal, all else is one error that says what."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.options import Limits, Sampling, read_options

NAMES = [entry.name for kind in (Sampling, Limits) for entry in fields(kind)]
WRONG = [float("nan"), float("inf"), "x", b"x", object(), [[1]], -1e9, 1j]
HUGE = 10**400  # no float is as large


@pytest.mark.parametrize("name", NAMES)
def test_none_is_the_default(name):
    assert read_options({name: None}) == read_options({})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", WRONG, ids=lambda v: repr(v).split(" at ")[0])
def test_wrong_values_are_named(name, value):
    if name == "stop" and value == "x":
        return
    with pytest.raises(GenerationError) as caught:
        read_options({name: value})
    assert name in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_numbers_that_are_too_large_for_their_type_are_named(name):
    with pytest.raises(GenerationError, match=f"{name} is 1000"):
        read_options({name: HUGE})
    assert read_options({"seed": HUGE})[0].seed == HUGE


@pytest.mark.parametrize("value", [1e-300, 1e300, 0.009, 101])
def test_penalties_that_overflow_float32_are_named(value):
    with pytest.raises(GenerationError, match="repetition_penalty is .* from 0.01 to 100"):
        read_options({"repetition_penalty": value})


@pytest.mark.parametrize("value", ["\udcff", ["end", "a\ud83d"]])
def test_stops_of_halves_of_characters_are_named(value):
    with pytest.raises(GenerationError, match="stop holds a byte that is no UTF-8"):
        read_options({"stop": value})


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("ignore_eos",)])
def test_true_is_no_number(name):
    with pytest.raises(GenerationError, match=f"{name} is True, expected"):
        read_options({name: True})


def test_equal_numbers_of_other_types():
    sampling, limits = read_options(
        {
            "top_k": 40.0,
            "seed": np.int64(3),
            "temperature": np.float32(0.5),
            "top_p": 1,
            "logit_bias": {"7": 1, 8: np.float32(-2)},
            "max_new_tokens": 2.0,
            "stop": ["a", "b"],
            "stop_token_ids": np.array([1, 2]),
        }
    )
    assert sampling == Sampling(0.5, 40, 1.0, seed=3, logit_bias={7: 1.0, 8: -2.0})
    assert type(sampling.top_k) is int and type(sampling.top_p) is float
    assert limits == Limits(2, stop=("a", "b"), stop_token_ids=frozenset({1, 2}))
    assert read_options({"stop": "end"})[1].stop == ("end",)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature is -1, expected a number of at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0, expected a number above 0 and at most 1"),
        ({"top_k": 1.5}, "top_k is 1.5, expected an integer of at least 0"),
        ({"seed": "1"}, "seed is '1', expected an integer"),
        ({"stop": [""]}, "stop holds ''"),
        ({"stop": 5}, "stop is 5, expected a list of texts"),
        ({"stop_token_ids": "2"}, "stop_token_ids is '2', expected a list of token ids"),
        ({"stop_token_ids": [1, -2]}, "a token of stop_token_ids is -2"),
        ({"logit_bias": {"x": 1}}, "a token of logit_bias is 'x'"),
        ({"logit_bias": {1: 101}}, r"logit_bias\[1\] is 101, expected a number from -100 to 100"),
        ({"logit_bias": [1]}, "expected a mapping"),
        ({"logprobs": 999}, "from 0 to 128"),
        ({"ignore_eos": 1}, "ignore_eos is 1, expected true or false"),
        ({"heat": 1}, "unknown generation option 'heat'; there are .*temperature"),
    ],
)
def test_errors_say_what_was_expected(options, words):
    with pytest.raises(GenerationError, match=words):
        read_options(options)


@pytest.mark.parametrize(
    "option",
    [{"repetition_penalty": 1.1}, {"presence_penalty": 1}, {"logit_bias": {1: 1}}, {"logprobs": 0}],
    ids=str,
)
def test_what_the_device_may_not_choose(option):
    assert Sampling().greedy and Sampling(temperature=1e-9).greedy
    assert not Sampling(**option).greedy and not Sampling(temperature=0.5).greedy
