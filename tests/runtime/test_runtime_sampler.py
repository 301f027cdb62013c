"""Every step of sampling against its definition, written out with full sorts."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.sampler import Sampler, Sampling, _largest, _nucleus, _pick, logprobs


def reference(logits, options):
    """Probabilities [vocab] by the definition of each step, in float64."""
    logits = logits.astype(np.float64) / options.temperature
    order = np.argsort(-logits, kind="stable")
    keep = np.zeros(logits.size, bool)
    keep[order[: options.top_k or logits.size]] = True
    p = np.where(keep, np.exp(logits - logits.max()), 0.0)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    mass = np.cumsum(p[order])
    keep = np.zeros(logits.size, bool)
    keep[order[: int(np.searchsorted(mass, options.top_p)) + 1]] = True
    p = np.where(keep, p, 0.0)
    p[p < options.min_p * p.max()] = 0.0
    return p / p.sum()


@pytest.mark.parametrize(
    "options",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=5),
        Sampling(temperature=1.3, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=0.9, top_k=20, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_frequencies_follow_the_definition(options):
    logits = np.random.default_rng(0).standard_normal(1500).astype(np.float32) * 3
    expected = reference(logits, options)
    sampler = Sampler(Sampling(**{**vars(options), "seed": 1}))
    draws = 8000
    counts = np.bincount([sampler(logits) for _ in range(draws)], minlength=logits.size)
    assert counts[expected == 0].sum() == 0
    error = np.sqrt(expected * (1 - expected) * draws)
    assert (np.abs(counts - expected * draws) <= 6 * error + 3).all()


@settings(max_examples=60)
@given(st.integers(1, 6000), st.integers(1, 300), st.integers(0, 2**32 - 1), st.booleans())
def test_largest_equals_a_full_sort(size, count, seed, ties):
    random = np.random.default_rng(seed)
    values = random.standard_normal(size).astype(np.float32)
    values = np.round(values) if ties else values
    expected = np.argsort(-values, kind="stable")[:count]
    np.testing.assert_array_equal(_largest(values, count), np.sort(expected))


@settings(max_examples=60)
@given(st.integers(1, 20000), st.floats(0.01, 0.999), st.floats(0.1, 20), st.integers(0, 2**32 - 1))
def test_nucleus_is_the_smallest_set_that_holds_the_mass(size, top_p, spread, seed):
    logits = np.random.default_rng(seed).standard_normal(size).astype(np.float32) * spread
    logits = np.round(logits) if seed % 2 else logits  # with and without equal weights
    weights = np.exp(logits - logits.max())
    chosen = _nucleus(weights, top_p)
    goal = top_p * weights.sum(dtype=np.float64)
    mass = weights[chosen].sum(dtype=np.float64)
    assert mass >= goal * (1 - 1e-5)  # sums are float32
    assert mass - weights[chosen].min() < goal * (1 + 1e-5)
    assert (np.diff(chosen) > 0).all()
    rest = np.delete(weights, chosen)
    assert not rest.size or rest.max() <= weights[chosen].min()


@settings(max_examples=60)
@given(st.integers(1, 3000), st.floats(0, 0.999999), st.integers(0, 2**32 - 1))
def test_pick_inverts_the_distribution(size, uniform, seed):
    random = np.random.default_rng(seed)
    weights = random.random(size).astype(np.float32) * (random.random(size) < 0.5)
    weights[random.integers(size)] = 1.0
    index = _pick(weights, uniform)
    assert weights[index] > 0
    mass = np.cumsum(weights.astype(np.float64))
    slack = 1e-4 * mass[-1]
    assert mass[index] + slack >= uniform * mass[-1] >= mass[index] - weights[index] - slack


def test_greedy_takes_the_largest():
    logits = np.array([0.0, 3.0, -1.0, 2.9], np.float32)
    assert Sampler(Sampling())(logits) == 1
    assert Sampler(Sampling(temperature=2.0, top_k=1))(logits) == 1
    assert Sampler(Sampling(temperature=1e-4, seed=0))(logits) == 1


def test_repetition_penalty():
    logits = np.array([4.0, 3.0, -1.0, -1.5], np.float32)
    kept = logits.copy()
    sampler = Sampler(Sampling(repetition_penalty=2.0), tokens=[0])
    assert sampler(logits) == 1  # 4 becomes 2
    assert sampler(logits) == 0  # 3 becomes 1.5
    np.testing.assert_array_equal(logits, kept)
    negative = np.array([-1.0, -1.5], np.float32)
    assert Sampler(Sampling(repetition_penalty=2.0), tokens=[0])(negative) == 1


def test_streams_of_one_seed_differ():
    logits = np.zeros(1000, np.float32)
    options = Sampling(temperature=1.0, seed=4)
    draws = [[Sampler(options, stream=s)(logits) for _ in range(1)] for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_nan_is_an_error():
    for temperature in (0.0, 1.0):
        with pytest.raises(GenerationError, match="NaN"):
            Sampler(Sampling(temperature=temperature))(np.array([0, np.nan, 1], np.float32))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 1.1}, {"min_p": 2}, {"seed": -1}],
)
def test_options_out_of_range(wrong):
    with pytest.raises(GenerationError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_presence_frequency_and_bias():
    logits = np.array([4.0, 3.5, 3.3, -9.0], np.float32)
    sampler = Sampler(Sampling(presence_penalty=0.4, frequency_penalty=0.2), tokens=[0, 0, 0])
    # The prompt does not count; 4 - 0.6 is below 3.5, 3.5 - 0.6 below 3.3, then 0 leads again.
    assert [sampler(logits) for _ in range(3)] == [0, 1, 0]
    assert Sampler(Sampling(logit_bias={3: 100, 0: -100}))(logits) == 3
    assert Sampler(Sampling(logit_bias={0: -100}))(logits) == 1


def test_what_may_not_be_chosen():
    logits = np.array([4.0, 3.0, 2.0], np.float32)
    for options in (Sampling(), Sampling(temperature=1.0, seed=1), Sampling(logit_bias={0: 100})):
        sampler = Sampler(options)
        only = np.array([False, False, True])
        assert sampler(logits, allowed=only) == 2
        assert sampler(logits, banned={0, 1}) == 2
        with pytest.raises(GenerationError, match="no token is allowed"):
            sampler(logits, allowed=~only, banned={0, 1})


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_are_those_of_the_softmax(count):
    logits = np.random.default_rng(3).standard_normal(700).astype(np.float32) * 4
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum())
    found = logprobs(logits, 17, count)
    assert found.token == 17 and abs(found.logprob - exact[17]) < 1e-9
    order = np.argsort(-exact, kind="stable")[:count]
    assert [token for token, _ in found.top] == order.tolist()
    np.testing.assert_allclose([value for _, value in found.top], exact[order], atol=1e-9)


@pytest.mark.parametrize("exponent", [-3, -5, -6, -7, -20, -37, -39, -42, -310])
@pytest.mark.parametrize("more", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_tiny_temperatures_take_the_most_likely(exponent, more):
    logits = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = Sampler(Sampling(temperature=10.0**exponent, seed=1, **more))
        assert sampler(logits) == logits.argmax()


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [49152, 128256])
def test_sampling_takes_a_fraction_of_a_step(vocab):
    """Below 2 ms even on a busy machine; docs name the quiet figures."""
    logits = np.random.default_rng(0).standard_normal(vocab).astype(np.float32) * 3
    sampler = Sampler(Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=0))
    times = []
    for _ in range(50):
        start = time.perf_counter()
        sampler(logits)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 2e-3
