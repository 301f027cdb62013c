"""What is packed for a GPU that chooses tokens: records, masks, biases, draws."""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm.runtime import choices
from amx_tvm.runtime.choices import CHOICE, WORDS, Flag, RowChoice, pack
from amx_tvm.runtime.options import Sampling
from amx_tvm.runtime.sampler import Sampler


def record(sampling: Sampling, mask: int | None = None, **places: int) -> np.void:
    choice = RowChoice(sampling, np.random.default_rng(0))
    for name, where in places.items():
        choice.place(name, where)
    return np.frombuffer(choice.record(mask), CHOICE)[0]


def test_every_setting_has_its_place():
    sampling = Sampling(
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=-0.4,
        logit_bias={7: 1.5, 9: -2.0},
        logprobs=4,
    )
    found = record(sampling, mask=5, counts=3, bias_first=11)
    assert Flag(int(found["flags"])) == (
        Flag.LIVE | Flag.DRAWS | Flag.PENALIZES | Flag.BIASED | Flag.MASKED
    )
    expected = {
        "top_p": 0.9,
        "top_k": 40,
        "counts": 3,
        "mask": 5,
        "bias_first": 11,
        "bias_count": 2,
        "logprobs": 4,
        "inverse_temperature": 2.0,
        "min_p": np.float32(0.1),
        "repetition_penalty": np.float32(1.2),
        "presence_penalty": np.float32(0.3),
        "frequency_penalty": np.float32(-0.4),
    }
    assert {name: found[name] for name in expected} == expected
    assert set(expected) | {"uniform", "flags"} == set(CHOICE.names)


def test_greedy_takes_no_draw_and_notes_nothing():
    random = np.random.default_rng(5)
    found = np.frombuffer(RowChoice(Sampling(), random).record(), CHOICE)[0]
    assert found["flags"] == Flag.LIVE and found["uniform"] == 0 and found["logprobs"] == -1
    assert random.random() == np.random.default_rng(5).random()


def test_draws_are_the_samplers_own():
    sampling = Sampling(temperature=1.0, seed=17)
    choice = RowChoice(sampling, Sampler(sampling, stream=2)._random)
    given = [np.frombuffer(choice.record(), CHOICE)[0]["uniform"] for _ in range(5)]
    other = Sampler(sampling, stream=2)._random
    assert given == [other.random() for _ in range(5)]


@pytest.mark.parametrize("temperature", [1e-6, 1e300])
def test_extreme_temperatures_stay_finite(temperature):
    inverse = record(Sampling(temperature=temperature))["inverse_temperature"]
    assert np.isfinite(inverse) and inverse > 0


def test_rows_without_a_request_are_empty():
    one = RowChoice(Sampling(), np.random.default_rng(0)).record()
    packed = pack([one, one], 8)
    assert packed.shape == (8, WORDS) and packed.dtype == np.int32
    assert packed[:2].any() and not packed[2:].any()
    with pytest.raises(ValueError, match="9 records for 8 rows"):
        pack([one] * 9, 8)


def test_masks_and_biases():
    allowed = np.random.default_rng(0).random(77) < 0.5
    allowed[[3, 76]] = True
    words = choices.mask_words(77, allowed, {3})
    bits = [(int(words[t // 32]) >> (t % 32)) & 1 for t in range(96)]
    allowed[3] = False
    assert bits == [*allowed.astype(int), *[0] * 19]
    everything = choices.mask_words(33, None)
    assert everything.tolist() == [-1, 1]
    entries = choices.bias_entries({5: 1.5, 40: -100})
    assert entries.dtype == np.int32 and entries[:, 0].tolist() == [5, 40]
    assert entries[:, 1].view(np.float32).tolist() == [1.5, -100.0]


def test_what_is_served():
    noted = Sampling(logprobs=2, presence_penalty=1.0)
    assert choices.serves(noted, clusters=True) and not choices.serves(noted, clusters=False)
    assert choices.serves(Sampling(logprobs=2), clusters=False)
    assert not choices.serves(Sampling(logprobs=2), clusters=False, masked=True)
    assert choices.serves(Sampling(logit_bias={1: 1.0}), clusters=False, masked=True)
