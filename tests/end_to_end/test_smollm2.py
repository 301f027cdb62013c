"""The whole way with a real model: its logits, text and perplexity against torch in float32.

What `evaluate` says of it is compared with an independent computation: the torch side builds its
own network from the checkpoint, runs it and computes KL divergence and agreement with torch's own
functions; nothing but the token ids is shared with the engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import amx_tvm
from amx_tvm.evaluation import Protocol
from amx_tvm.runtime.session import decode_batch

from .reference import opticks, perplexity, relative_error, torch_logits, torch_model

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end]
PROMPT = "The capital of France is"
# Of `evaluate`. One position in 1275 is 8e-4: even a tie that float32 rounding decides stays within
# the bar.
WINDOW, WINDOWS = 256, 5
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def token_ids(compiled):
    engine = amx_tvm.load(compiled(strict=True))
    return list(engine.tokenizer.encode(opticks()[:40000]).ids)


@pytest.fixture(scope="module")
def rounded_model(source):
    return torch_model(source, "amxfp4", "int8")


def test_strict_logits_and_text_equal_torch(compiled, rounded_model, token_ids):
    engine = amx_tvm.load(compiled(strict=True))
    got = np.asarray(engine.logits(token_ids[:256]))
    assert relative_error(got, torch_logits(rounded_model, token_ids[:256])) < 1e-4
    prompt = engine.tokenizer.encode(PROMPT).ids
    expected = rounded_model.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=2
    )[0].tolist()[len(prompt) :]
    assert engine.generate(PROMPT, max_new_tokens=64).token_ids == expected


def test_int8_activations_stay_close(compiled, rounded_model, token_ids):
    engine = amx_tvm.load(compiled())
    got = np.asarray(engine.logits(token_ids[:256]))
    assert relative_error(got, torch_logits(rounded_model, token_ids[:256])) < 2e-2


def test_steps_of_any_number_of_sequences_equal_scoring(compiled, token_ids):
    """One, a few and many sequences take other functions; scoring takes none of them."""
    engine = amx_tvm.load(compiled(), max_sequences=18)
    for batch in (1, 3, 16, 17):
        parts = [token_ids[50 * i : 50 * i + 12] for i in range(batch)]
        made = [engine.sequence() for _ in range(batch)]
        for sequence, ids in zip(made, parts, strict=True):
            sequence.append(ids[:9])
        for step in range(9, 12):
            rows = decode_batch(made, [ids[step] for ids in parts])
        for row, ids in ((rows[0], parts[0]), (rows[-1], parts[-1])):
            # Float sums in another order round some activations otherwise: 0.7 to 3 %.
            assert relative_error(row, np.asarray(engine.logits(ids))[-1]) < 5e-2
        for sequence in made:
            sequence.close()


def test_decode_equals_prefill(compiled, token_ids):
    engine = amx_tvm.load(compiled(strict=True))
    ids = token_ids[:24]
    text = engine.generate(ids, max_new_tokens=8)
    full = np.asarray(engine.logits(ids + text.token_ids[:-1]))
    assert full[len(ids) - 1 :].argmax(axis=1).tolist() == text.token_ids


@pytest.mark.parametrize(
    ("quantization", "windows", "expected", "tolerance"),
    [("amxfp4", 8, 28.44, 0.02), ("mxfp4", 2, 36.09, 0.02), ("none", 2, 21.62, 0.005)],
)
def test_perplexity_of_the_engine(compiled, token_ids, quantization, windows, expected, tolerance):
    engine = amx_tvm.load(compiled(quantization))
    found = perplexity(lambda ids: np.asarray(engine.logits(ids)), token_ids, windows)
    assert abs(found / expected - 1) < tolerance, found


def divergences(got, known):
    """Mean KL(known || got) and top-1 agreement of logits [windows, tokens, vocab], by torch."""
    got, known = (logits[:, :-1].double().log_softmax(-1) for logits in (got, known))
    kl = torch.nn.functional.kl_div(got, known, reduction="none", log_target=True).sum(-1)
    agree = (got.argmax(-1) == known.argmax(-1)).double()
    return kl.mean().item(), agree.mean().item()


def test_kl_top1_and_perplexity_equal_torch(compiled, source, rounded_model, token_ids):
    exact = torch_model(source, "none", "none")
    engine = amx_tvm.load(compiled(strict=True))
    ids = token_ids[: WINDOWS * WINDOW]
    batch = torch.tensor(ids).view(WINDOWS, WINDOW)
    with torch.no_grad():
        known, got = (model(batch).logits for model in (exact, rounded_model))
    nll = torch.nn.functional.cross_entropy(
        got[:, :-1].flatten(0, 1).double(), batch[:, 1:].flatten()
    )
    kl, agree = divergences(got, known)
    assert kl > 0.05 and agree < 0.95
    by_torch, by_engine = (
        amx_tvm.evaluate(engine, ids, reference=reference, protocol=Protocol(WINDOW))
        for reference in (exact, compiled("none"))
    )
    for result in (by_torch, by_engine):
        assert result.tokens == WINDOWS * (WINDOW - 1)
        assert result.perplexity == pytest.approx(nll.exp().item(), rel=TOLERANCE)
        assert result.kl == pytest.approx(kl, abs=TOLERANCE)
        assert result.top1 == pytest.approx(agree, abs=TOLERANCE)
    # The same logits, summed up by torch: no network between the two, so no rounding either.
    own = torch.stack([torch.as_tensor(engine.logits(window.tolist())) for window in batch])
    kl, agree = divergences(own, known)
    assert by_torch.kl == pytest.approx(kl, abs=1e-6)
    assert by_torch.top1 == pytest.approx(agree, abs=1e-9)


def test_every_linear_is_named_with_its_kernel(compiled):
    command = [sys.executable, "-m", "amx_tvm", "inspect", compiled(), "--json"]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    linears = shown["linears"]
    assert len({entry["name"] for entry in linears}) == 30 * 4 + 1
    for entry in linears:
        assert entry["kernel"] and entry["why"] and entry["spec"]["n"] and entry["rows"]


def test_loading_is_quick_and_small(compiled):
    """Load with less than a second of work; resident memory under artifact + KV cache + 150 MB."""
    script = f"""
import time
import amx_tvm
from amx_tvm import runtime
start = time.process_time()
engine = amx_tvm.load({compiled()!r})
print(time.process_time() - start)
engine.generate({PROMPT!r}, max_new_tokens=16)
# Not ru_maxrss: that one still counts the process that started this one.
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
kv = engine.manifest.kv_cache
token = 2 * kv["layers"] * kv["kv_heads"] * kv["head_dim"] * (2 if kv["dtype"] == "float16" else 4)
print(32 * token)  # the pages that 32 tokens touch
"""
    best = None
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        seconds, resident, cache = (float(v) for v in out.stdout.split())
        best = seconds if best is None else min(best, seconds)
    from amx_tvm.artifact import artifact_bytes

    assert best < 1.0
    assert resident < artifact_bytes(compiled()) + cache + 150e6


def test_first_token_of_a_whole_process(compiled):
    command = [sys.executable, "-m", "amx_tvm", "generate", compiled(), PROMPT, "-n", "1"]
    best = 1e9
    for _ in range(3):
        before = os.times()
        subprocess.run(command, capture_output=True, check=True)
        after = os.times()  # of work: others may hold the cores
        used = after.children_user - before.children_user
        best = min(best, used + after.children_system - before.children_system)
    assert best < 3.0
