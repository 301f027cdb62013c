"""Kernels that choose tokens: compiled for real, and their text on the CPU against the sampler."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

import choosing  # noqa: E402
from choosing import Row, pointers, some_logits  # noqa: E402
from cuda_compiled import compile_functions, needs_nvcc  # noqa: E402

from amx_tvm.runtime.choices import ROWS  # noqa: E402
from amx_tvm.runtime.options import MOST_LOGPROBS, Sampling  # noqa: E402
from amx_tvm.targets.cuda.gpus import gpu  # noqa: E402
from relax_passes.kernels.cuda.choose import kernels  # noqa: E402

VOCAB = 3001
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@needs_nvcc
@pytest.mark.parametrize("arch,vocab", [("sm_80", 49152), ("sm_90a", 128256)])
def test_kernels_compile(arch, vocab):
    clusters = gpu(arch).clusters
    functions = {
        "choose": kernels.choose(vocab, arch, dependent=clusters),
    }
    made = compile_functions(functions, arch)
    assert made.cubin[:4] == b"\x7fELF"
    assert ("mapa.u64" in made.ptx) == ("barrier.cluster.arrive" in made.ptx) == clusters
    assert ("griddepcontrol.wait" in made.ptx) == clusters
    assert made.resources()
    for name, used in made.resources().items():
        # what the call behind the choice, of log-probabilities, has to keep; the choice keeps all
        assert used.spilled <= (48 if clusters else 96), name
        assert used.registers <= (64 if clusters else 128), name
    # two blocks of 64 thousand bytes of logits beside their tables on a multiprocessor
    floats = kernels._floats(vocab, kernels.SPLITS if clusters else 1)
    assert 2 * (4 * floats + 1024) <= gpu(arch).shared_bytes


@pytest.fixture(scope="module", params=[2, 1], ids=["cluster", "block"])
def library(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("choose")
    return choosing.team_on_cpu(VOCAB, request.param, folder)


def choose(library, rows: list[Row], seed: int) -> tuple[choosing.Step, np.ndarray]:
    step = choosing.pack(rows, VOCAB, seed)
    library.choose(len(rows), *pointers(*step.arrays))
    return step, step.tokens


def wrong(rows: list[Row], tokens: np.ndarray, seed: int) -> list:
    """Rows whose token is not the sampler's, for no reason of rounding."""
    return [
        (row.sampling, int(token), row.expected(seed + i))
        for i, (row, token) in enumerate(zip(rows, tokens, strict=False))
        if token != row.expected(seed + i)
        and not (token >= 0 and row.explains(seed + i, int(token)))
    ]


@needs_compiler
def test_tokens_are_the_samplers(library):
    rng = np.random.default_rng(1)
    rows = [Row(some_logits(rng, VOCAB, i % 9), choosing.samplings(rng, VOCAB)) for i in range(45)]
    _, tokens = choose(library, rows, 100)
    assert not wrong(rows, tokens, 100)
    exact = sum(
        int(t) == r.expected(100 + i) for i, (r, t) in enumerate(zip(rows, tokens, strict=False))
    )
    assert exact >= len(rows) - 1


@needs_compiler
def test_what_changes_logits(library):
    rows = choosing.edited_rows(np.random.default_rng(2), VOCAB)
    before = choosing.pack(rows, VOCAB, 7)
    step, tokens = choose(library, rows, 7)
    assert not wrong(rows, tokens, 7)
    assert (tokens < 0).sum() >= 5  # broken, or nothing allowed; and rows beyond are not written
    expected = choosing.counts_after(before, rows, tokens)
    np.testing.assert_array_equal(step.counts, expected)


@needs_compiler
def test_rows_without_a_request_do_nothing(library):
    step = choosing.pack([Row(np.full(VOCAB, np.nan, np.float32), Sampling())], VOCAB, 0)
    step.options[:] = 0
    library.choose(1, *pointers(*step.arrays))
    assert step.tokens[0] == 0 and (step.tokens[1:] == -9).all()


@needs_compiler
def test_log_probabilities(library):
    rng = np.random.default_rng(3)
    asked = [None, 0, 1, 20, 128, 5]
    rows = [
        Row(some_logits(rng, VOCAB, kind), Sampling(temperature=1.0, top_k=9, logprobs=n))
        for n, kind in zip(asked, (0, 0, 1, 2, 3, 7), strict=True)
    ]
    step, tokens = choose(library, rows, 9)
    ids = np.full((ROWS, MOST_LOGPROBS), -9, np.int32)
    values = np.full((ROWS, 1 + MOST_LOGPROBS), np.nan, np.float32)
    given = pointers(step.logits, step.options, tokens, ids, values)
    library.logprobs(len(rows), *given)
    choosing.check_logprobs(rows, tokens, ids, values)
