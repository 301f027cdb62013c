"""Results of every format, epilogue and bucket against float64, on the GPU that is here."""

from __future__ import annotations

import pytest

tvm = pytest.importorskip("tvm")
torch = pytest.importorskip("torch")

from amx_tvm import cuda_build  # noqa: E402
from benchmarks.gpu import cases, harness  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.key)
def test_case(case, tmp_path):
    target = cuda_build.cuda_target()
    func = cases.build_function(case, str(target.attrs["arch"]))
    path = tmp_path / "case.so"
    tvm.compile(tvm.IRModule({"main": func}), target=target).export_library(str(path))
    errors = cases.run_case(harness.load_function(path), cases.reference(case, seed=1))
    assert all(error < cases.TOLERANCE for error in errors.values()), errors
