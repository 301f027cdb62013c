# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""Attention without a cache on CUDA: its numbers on the CPU, and what nvcc makes of it."""

from __future__ import annotations

import ctypes as c
import re
from pathlib import Path

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from choosing import on_cpu, pointers  # noqa: E402
from cuda_compiled import compile_functions, needs_nvcc  # noqa: E402

from relax_passes.attention_spec import AttentionSpec, Rotation  # noqa: E402
from relax_passes.kernels.cuda.attention import dense  # noqa: E402
from relax_passes.kernels.cuda.attention.dense_text import (  # noqa: E402
    ATTEND_EXAMPLE,
    ATTEND_TEXTS,
    shared_floats,
)
from relax_passes.kernels.cuda.rows.kernels import row_kernel  # noqa: E402
from relax_passes.kernels.cuda.rows.pool import mean_rows  # noqa: E402

HEADS, KV, D, C, BN = 4, 2, 32, 24, 16
LENGTHS = (5, 1, 130, 64, 65)


def expected(q, k, v, causal=False, window=0, cap=0.0, bias=None):
    """Attention of one text: q [s, heads, c], k and v [t, kv, c], float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, 1) for x in (k, v))
    scores = np.einsum("shc,thc->hst", q, k) * q.shape[2] ** -0.5
    scores = cap * np.tanh(scores / cap) if cap else scores
    scores = scores if bias is None else scores + bias
    far = np.subtract.outer(np.arange(len(q)), np.arange(len(k)))
    seen = (far >= 0 if causal else far > -(10**9)) & (np.abs(far) < (window or 10**9))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hst,thc->shc", weights / weights.sum(-1, keepdims=True), v)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Run blocks of both kernels on the CPU: plain, causal, and with a bias."""
    text = ATTEND_TEXTS.full_text + ATTEND_EXAMPLE.full_text.replace("#include <cuda_fp16.h>", "")
    text = text.replace("#include <cuda_fp16.h>", "")
    runs = ""
    for causal in (0, 1):
        flags = "true" if causal else "false"
        runs += f"""
extern "C" void texts{causal}(void* qkv, void* bounds, void* out, int texts, float scale, float cap, int window, int blocks) {{
  for (int block = 0; block < blocks; ++block)
    for (int head = 0; head < {HEADS}; ++head)
      run_team(1, 128, [=](int i) {{
        amx_attend_texts<{D}, {C}, {HEADS}, {KV}, {BN}, {flags}>(shared_of(0), qkv, bounds, out, texts, scale, cap, window, block, head, i / 32, i % 32);
      }});
}}
extern "C" void example{causal}(void* q, void* k, void* v, void* bias, void* out, int q_step, int k_step, int bias_step, int rows, int keys, float scale) {{
  for (int tile = 0; tile * 64 < rows; ++tile)
    run_team(1, 128, [=](int i) {{
      amx_attend_example<{D}, {C}, {BN}, true, {flags}>(shared_of(0), q, k, v, bias, out, q_step, k_step, k_step, {C}, bias_step, rows, keys, tile, scale, i / 32, i % 32);
    }});
}}
"""
    assert shared_floats(D, BN) * 4 < 256 << 10
    header = f'#include "{Path(__file__).parent}/tensor_cores.h"\n'
    return on_cpu(header + text, runs, tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("causal,window,cap", [(0, 0, 0.0), (1, 0, 0.0), (0, 20, 0.0), (1, 9, 2.0)])
def test_texts_attend_each_inside_itself(built, causal, window, cap):

    random, rows = np.random.default_rng(0), sum(LENGTHS)
    qkv = random.standard_normal((rows, HEADS + 2 * KV, C)).astype(np.float16)
    out = np.full((rows, HEADS, C), np.nan, np.float16)
    bounds = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    scale = C**-0.5 * (1.0 if cap else dense.LOG2E)
    run = getattr(built, f"texts{causal}")
    blocks = rows // 64 + len(LENGTHS) + 1
    given = (len(LENGTHS), c.c_float(scale), c.c_float(cap), window, blocks)
    run(*pointers(qkv, bounds, out), *given)
    for first, end in zip(bounds, bounds[1:], strict=False):
        q, k, v = np.split(qkv[first:end].astype(np.float64), [HEADS, HEADS + KV], 1)
        wanted = expected(q, k, v, bool(causal), window, cap)
        np.testing.assert_allclose(out[first:end], wanted, atol=4e-3)


@pytest.mark.parametrize("causal", [0, 1])
def test_an_example_reads_a_bias_and_other_keys(built, causal):

    random, rows, keys = np.random.default_rng(1), 70, 45
    q = random.standard_normal((rows, C)).astype(np.float16)
    kv = random.standard_normal((keys, 2, C)).astype(np.float16)
    bias = random.standard_normal((rows, keys)).astype(np.float16)
    bias[3, 5:] = -65504
    out = np.full((rows, C), np.nan, np.float16)
    k, v = np.ascontiguousarray(kv[:, 0]), np.ascontiguousarray(kv[:, 1])
    given = (C, C, keys, rows, keys, c.c_float(C**-0.5 * dense.LOG2E))
    getattr(built, f"example{causal}")(*pointers(q, k, v, bias, out), *given)
    one = [x.astype(np.float64)[:, None] for x in (q, k, v)]
    wanted = expected(*one, bool(causal), bias=bias.astype(np.float64))[:, 0]
    np.testing.assert_allclose(out, wanted, atol=4e-3)


def functions() -> dict:
    spec = AttentionSpec(0, 4, 2, 64, 0.125, rotation=Rotation((1.0, 0.5, 0.25)))
    line = dense.Place(0, 197 * 768, 768, 64)
    wide = dense.Place(0, 197 * 2304, 2304, 128)
    one = dense.Examples((16, 197, 12, 64), 197, 12, 0.125, False, line, line, line, None)
    large = dense.Examples((2, 197, 4, 256), 197, 4, 0.1, True, wide, wide, wide, line)
    return {
        "turn": dense.turn(spec),
        "texts": dense.texts(spec, False, "sm_90a"),
        "examples": dense.examples(one, "sm_90a"),
        "large": dense.examples(large, "sm_90a"),
        "norm": row_kernel(384, None, norm_eps=1e-5, centred=True, dependent=True),
        "gelu": row_kernel(1000, None, gelu="erf"),
        "pool": mean_rows(384),
    }


@needs_nvcc
def test_kernels_compile_and_do_not_spill():
    made = compile_functions(functions(), "sm_90a")
    # 256 channels of a query and its sums are all registers that there are
    spilled = {name: used.spilled for name, used in made.resources().items() if used.spilled}
    assert set(spilled) <= {"large_kernel"} and sum(spilled.values()) < 128, spilled
    assert len(re.findall(r"\.entry ", made.ptx)) == 7


def test_heads_of_whole_pieces_fit():
    assert dense.fits(24) and dense.fits(256) and not dense.fits(20) and not dense.fits(264)
