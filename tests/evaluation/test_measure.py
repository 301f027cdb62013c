"""Metrics and windows against independent computations, and errors for bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amx_tvm.errors import EvaluationError
from amx_tvm.evaluation import Protocol, cut, measure, overlap, torch_logits
from amx_tvm.evaluation.metrics import score

VOCAB = 97


def table_model(seed: int, noise: float = 0.0):
    """Logits that depend on the last two tokens."""
    rng = np.random.default_rng(7)
    first, second = rng.normal(0, 2, (2, VOCAB, VOCAB))
    shift = np.random.default_rng(seed).normal(0, noise, (VOCAB, VOCAB))

    def logits(ids):
        ids = np.asarray(ids)
        before = np.concatenate([[0], ids[:-1]])
        return (first[ids] + second[before] + shift[ids]).astype(np.float32)

    return logits


def text(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, n)


def test_perplexity_kl_and_top1_equal_torch():
    ids = text(8 * 64)
    exact, other = table_model(0), table_model(1, noise=0.5)
    result = measure(other, cut(ids, Protocol(64)), reference=exact, bits=4.5)
    nll, kl, agree = [], [], []
    for window in torch.from_numpy(ids).view(8, 64):
        a = torch.from_numpy(exact(window)).double()
        b = torch.from_numpy(other(window)).double()
        nll.append(torch.nn.functional.cross_entropy(b[:-1], window[1:], reduction="none"))
        ref, log = torch.log_softmax(a[:-1], -1), torch.log_softmax(b[:-1], -1)
        kl.append(torch.nn.functional.kl_div(log, ref, reduction="none", log_target=True).sum(-1))
        agree.append((ref.argmax(-1) == log.argmax(-1)).double())
    assert result.perplexity == pytest.approx(torch.cat(nll).mean().exp().item(), rel=1e-9)
    assert result.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-9)
    assert result.top1 == pytest.approx(torch.cat(agree).mean().item(), rel=1e-12)
    assert result.tokens == 8 * 63 and result.windows == 8 and result.bits == 4.5
    assert result.stderr > 0 and result.kl > 0.01 and 0 < result.top1 < 1


def test_a_model_against_itself():
    result = measure(table_model(0), cut(text(256), Protocol(64)), reference=table_model(0))
    assert result.kl == pytest.approx(0, abs=1e-12) and result.top1 == 1.0


@given(
    length=st.integers(8, 200),
    window=st.integers(2, 40),
    stride=st.integers(0, 40),
    limit=st.integers(0, 5),
)
def test_every_token_is_scored_at_most_once(length, window, stride, limit):
    if stride > window or length < window:
        return
    ids = np.arange(length)
    windows = cut(ids, Protocol(window, stride, limit))
    scored = [t for w in windows for t in w.ids[w.first :]]
    assert len(scored) == len(set(scored)) and len(windows) >= 1
    if 0 < stride < window:  # gapless, and always with context
        assert scored == list(range(1, scored[-1] + 1))
        assert all(w.first >= window - stride for w in windows[1:])
    assert not limit or len(windows) <= limit


def test_a_stride_gives_more_context():
    ids, seen = text(400), []
    model = table_model(0)
    windows = cut(ids, Protocol(100, 50))
    result = measure(lambda i: seen.append(len(i)) or model(i), windows)
    assert set(seen) == {100} and result.tokens == 99 + 50 * (len(windows) - 1)


def test_score_takes_extreme_logits():
    logits = np.array([[0.0, 2e4, -2e4], [1e30, -1e30, 0.0]], np.float32)
    sums = score(logits, np.array([1, 0]), logits)
    assert sums.nll == 0 and sums.kl == 0 and sums.correct == 2 and sums.agree == 2


def test_progress_tells_the_perplexity():
    told = []
    windows = cut(text(256), Protocol(64))
    measure(table_model(0), windows, name="tiny", progress=lambda *a: told.append(a))
    assert [t[0] for t in told] == [0, 1, 2, 3, 4] and "tiny: perplexity" in told[-1][2]


def test_single_window_has_no_spread():
    result = measure(table_model(0), cut(text(64), Protocol(64)))
    assert math.isnan(result.stderr) and result.to_dict()["stderr"] is None
    assert result.kl is None and result.top1 is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda ids: np.zeros((len(ids) - 1, VOCAB)), "shape"),
        (lambda ids: np.zeros(VOCAB), "shape"),
        (lambda ids: np.full((len(ids), VOCAB), np.nan), "finite"),
    ],
)
def test_bad_logits(model, message):
    with pytest.raises(EvaluationError, match=message):
        measure(model, cut(text(64), Protocol(64)))


def test_bad_input():
    with pytest.raises(EvaluationError, match="less than one window"):
        cut(text(10), Protocol(64))
    with pytest.raises(EvaluationError, match="vocabulary has 50"):
        cut(text(100), Protocol(64), 50)
    with pytest.raises(EvaluationError, match="stride"):
        Protocol(64, 65)
    with pytest.raises(EvaluationError, match="share their tokenizer"):
        windows = cut(text(64), Protocol(64))
        measure(table_model(0), windows, reference=lambda i: np.zeros((len(i), 5)))
    with pytest.raises(EvaluationError, match="no windows"):
        measure(table_model(0), [])


def test_torch_models_are_wrapped():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(VOCAB, 8), torch.nn.Linear(8, VOCAB))
    ids = text(32).tolist()
    with torch.no_grad():
        want = model(torch.tensor(ids)).numpy()
    np.testing.assert_allclose(torch_logits(model)(ids), want, rtol=1e-5)


def test_overlap_finds_passages_anywhere():
    test, other = text(320, 1).tolist(), text(5000, 2).tolist()
    assert overlap(other, test) == 0
    assert overlap(other[:7] + test[:160] + other, test) == pytest.approx(0.5)
    assert overlap(test, test) == 1 and overlap(test[:5], test) == 0
