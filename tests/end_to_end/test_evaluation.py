"""What `evaluate` says of a real model, against an independent computation in torch.

The torch side builds its own network from the checkpoint, runs it and computes KL divergence and
agreement with torch's own functions; nothing but the token ids is shared with the engine.
"""

from __future__ import annotations

import pytest
import torch

import amx_tvm
from amx_tvm.evaluation import Protocol

from .reference import opticks, torch_model

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end]
# One position in 1275 is 8e-4: even a tie that float32 rounding decides stays within the bar.
WINDOW, WINDOWS = 256, 5
TOLERANCE = 1e-3


def divergences(got, known):
    """Mean KL(known || got) and top-1 agreement of logits [windows, tokens, vocab], by torch."""
    got, known = (logits[:, :-1].double().log_softmax(-1) for logits in (got, known))
    kl = torch.nn.functional.kl_div(got, known, reduction="none", log_target=True).sum(-1)
    agree = (got.argmax(-1) == known.argmax(-1)).double()
    return kl.mean().item(), agree.mean().item()


def test_kl_top1_and_perplexity_equal_torch(compiled, source):
    exact = torch_model(source, "none", "none")
    rounded = torch_model(source, "amxfp4", "int8")
    engine = amx_tvm.load(compiled(strict=True))
    ids = engine.encode(opticks()[:8000])[: WINDOWS * WINDOW]
    batch = torch.tensor(ids).view(WINDOWS, WINDOW)
    with torch.no_grad():
        known, got = (model(batch).logits for model in (exact, rounded))
    nll = torch.nn.functional.cross_entropy(
        got[:, :-1].flatten(0, 1).double(), batch[:, 1:].flatten()
    )
    kl, agree = divergences(got, known)
    assert kl > 0.05 and agree < 0.95
    for reference in (exact, compiled("none")):
        result = amx_tvm.evaluate(engine, ids, reference=reference, protocol=Protocol(WINDOW))
        assert result.tokens == WINDOWS * (WINDOW - 1)
        assert result.perplexity == pytest.approx(nll.exp().item(), rel=TOLERANCE)
        assert result.kl == pytest.approx(kl, abs=TOLERANCE)
        assert result.top1 == pytest.approx(agree, abs=TOLERANCE)
    # The same logits, summed up by torch: no network between the two, so no rounding either.
    own = torch.stack([torch.as_tensor(engine.logits(window.tolist())) for window in batch])
    kl, agree = divergences(own, known)
    result = amx_tvm.evaluate(engine, ids, reference=exact, protocol=Protocol(WINDOW))
    assert result.kl == pytest.approx(kl, abs=1e-6)
    assert result.top1 == pytest.approx(agree, abs=1e-9)
