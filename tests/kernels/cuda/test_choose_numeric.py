"""Kernels that choose tokens on the GPU that is here, against the CPU's sampler.

With AMX_TVM_GPU_KERNELS=FOLDER they come from there, as in test_numeric.py; the folder is made by

    AMX_TVM_GPU_KERNELS=FOLDER python tests/kernels/cuda/test_choose_numeric.py sm_90a
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import choosing  # noqa: E402
from choosing import Row, Step, some_logits  # noqa: E402

from amx_tvm.runtime.choices import ROWS  # noqa: E402
from amx_tvm.runtime.options import MOST_LOGPROBS, Sampling  # noqa: E402
from benchmarks.gpu import harness  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PREBUILT = os.environ.get("AMX_TVM_GPU_KERNELS")
VOCABS = (49152, 128256, 151936)


def build(vocab: int, path: Path, arch: str) -> None:
    import tvm

    from amx_tvm.targets import resolve
    from relax_passes.kernels.cuda.choose import kernels

    function = kernels.choose(vocab, arch).with_attr("global_symbol", "choose")
    module = tvm.IRModule({"choose": function})
    tvm.compile(module, target=resolve(f"cuda:{arch}").tvm).export_library(str(path))


@pytest.fixture(scope="module", params=VOCABS)
def library(request, tmp_path_factory):
    """A vocabulary, and its kernels from the prebuilt folder or built here."""
    vocab = request.param
    if PREBUILT:
        harness.load_runtime(os.environ.get("AMX_TVM_RUNTIME"))
        path = Path(PREBUILT) / f"choose_{vocab}.so"
    else:
        pytest.importorskip("tvm")
        path = tmp_path_factory.mktemp("choose") / "kernels.so"
        major, minor = torch.cuda.get_device_capability()
        build(vocab, path, f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else ""))
    import tvm_ffi

    return vocab, tvm_ffi.load_module(str(path))


def run(module, step: Step) -> list:
    """Choose; the tensors of the step, ids and values of log-probabilities last."""
    tensors = [torch.from_numpy(a).cuda() for a in step.arrays]
    tensors.append(torch.full((ROWS, MOST_LOGPROBS), -9, dtype=torch.int32, device="cuda"))
    tensors.append(torch.full((ROWS, 1 + MOST_LOGPROBS), float("nan"), device="cuda"))
    module["choose"](*tensors)
    torch.cuda.synchronize()
    return tensors


def test_tokens_are_the_samplers(library):
    vocab, module = library
    rng = np.random.default_rng(vocab)
    rows = [Row(some_logits(rng, vocab, i % 9), choosing.samplings(rng, vocab)) for i in range(99)]
    rows += choosing.edited_rows(rng, vocab)
    step = choosing.pack(rows, vocab, 50)
    step.logits = np.concatenate([step.logits, np.full((5, vocab), np.nan, np.float32)])
    tensors = run(module, step)
    tokens = tensors[5].cpu().numpy()
    expected = [row.expected(50 + i) for i, row in enumerate(rows)]
    other = [i for i, token in enumerate(expected) if token != tokens[i]]
    assert all(tokens[i] >= 0 and rows[i].explains(50 + i, int(tokens[i])) for i in other)
    assert len(other) <= 4  # at an edge of the running sum
    assert not tokens[len(rows) : len(rows) + 5].any()  # no request there
    counts = choosing.counts_after(step, rows, tokens)
    np.testing.assert_array_equal(tensors[2].cpu().numpy(), counts)
    np.testing.assert_array_equal(run(module, step)[5].cpu().numpy(), tokens)


def test_log_probabilities(library):
    vocab, module = library
    rng = np.random.default_rng(vocab)
    asked = [None, 0, 1, 20, 128, 5]
    rows = [
        Row(some_logits(rng, vocab, kind), Sampling(temperature=1.0, top_p=0.9, logprobs=n))
        for n, kind in zip(asked, (0, 0, 1, 2, 3, 7), strict=True)
    ]
    tensors = run(module, choosing.pack(rows, vocab, 60))
    found = [tensor.cpu().numpy() for tensor in tensors[5:]]
    choosing.check_logprobs(rows, *found)


if __name__ == "__main__":
    folder = Path(os.environ["AMX_TVM_GPU_KERNELS"])
    folder.mkdir(parents=True, exist_ok=True)
    for size in VOCABS:
        build(size, folder / f"choose_{size}.so", sys.argv[1])
