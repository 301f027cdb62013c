"""What `evaluate` says of a real model, against an independent computation in torch."""

from __future__ import annotations

import pytest
import torch

import amx_tvm
from amx_tvm.evaluation import Protocol

from .reference import opticks, torch_model

pytestmark = pytest.mark.slow
WINDOW, WINDOWS = 256, 3


def test_kl_top1_and_perplexity_equal_torch(compiled, source):
    exact = torch_model(source, "none", "none")
    rounded = torch_model(source, "amxfp4", "int8")
    engine = amx_tvm.load(compiled(strict=True))
    ids = engine.encode(opticks()[:8000])[: WINDOWS * WINDOW]
    with torch.no_grad():
        batch = torch.tensor(ids).view(WINDOWS, WINDOW)
        known, got = (model(batch).logits.double().log_softmax(-1) for model in (exact, rounded))
    nll = torch.nn.functional.nll_loss(got[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    kl = torch.nn.functional.kl_div(got, known, reduction="none", log_target=True).sum(-1)
    agree = (got.argmax(-1) == known.argmax(-1)).double()
    assert kl[:, :-1].mean() > 0.05 and agree[:, :-1].mean() < 0.95
    for reference in (exact, compiled("none")):
        result = amx_tvm.evaluate(engine, ids, reference=reference, protocol=Protocol(WINDOW))
        assert result.tokens == WINDOWS * (WINDOW - 1)
        assert result.perplexity == pytest.approx(nll.exp().item(), rel=1e-3)
        assert result.kl == pytest.approx(kl[:, :-1].mean().item(), abs=1e-3)
        # One position of 765 may be a tie that float32 noise decides.
        assert result.top1 == pytest.approx(agree[:, :-1].mean().item(), abs=1.5e-3)
