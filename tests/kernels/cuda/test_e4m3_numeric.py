"""Products of E4M3 on the GPU that is here, against the NumPy oracle.

With AMX_TVM_GPU_KERNELS=FOLDER they come from there, as in test_numeric.py; the folder is made by

    AMX_TVM_GPU_KERNELS=FOLDER python tests/kernels/cuda/test_e4m3_numeric.py
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from amx_tvm.formats import e4m3  # noqa: E402
from benchmarks.gpu import cases, harness, models  # noqa: E402
from relax_passes.activation import E4M3_ROWS  # noqa: E402

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU, reason="needs an H100 or another GPU with wgmma"),
]

ARCH = "sm_90a"
PREBUILT = os.environ.get("AMX_TVM_GPU_KERNELS")
MODEL = ("tiny-llama", "amxfp4-w4a8", "amxfp4")  # name, linears, head
NUMBERS = (1, 16, 17, 33, 64, 65, 100, 128, 129, 300, 520)


def build_linear(case: cases.Case, path: Path) -> None:
    build(cases.build_function(case, ARCH, e4m3=True), path)


def build_rows(k: int, path: Path) -> None:
    from relax_passes.kernels.cuda.rows.e4m3 import round_rows

    build(round_rows(k, None), path)


def build(function, path: Path) -> None:
    import tvm

    from amx_tvm.targets import resolve

    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    tvm.compile(module, target=resolve(f"cuda:{ARCH}").tvm).export_library(str(path))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Load a kernel by its builder and what that takes, from the prebuilt folder or built here."""
    folder = Path(PREBUILT) if PREBUILT else tmp_path_factory.mktemp("e4m3")
    if PREBUILT:
        harness.load_runtime(os.environ.get("AMX_TVM_RUNTIME"))

    def load(make, what):
        path = folder / f"{make.__name__}-{getattr(what, 'key', what)}.so"
        if not path.exists():
            make(what, path)
        return harness.load_function(path)

    return load


@pytest.mark.parametrize("case", cases.E4M3_CASES, ids=lambda c: c.key)
def test_linear(case, kernel):
    """Rounding kernel, bit for bit, and linear on both sides of the first rows in E4M3."""
    rounding, linear = kernel(build_rows, case.k), kernel(build_linear, case)
    arrays = cases.e4m3_arrays(case, seed=4)
    names = [n for n in ("codes", "scales", "tile_scale", "table", "bias") if n in arrays]
    weights = [torch.from_numpy(arrays[n]).cuda() for n in names]
    for rows in NUMBERS:
        x = arrays["x"][:rows]
        codes = torch.full(x.shape, 0x7F, dtype=torch.uint8, device="cuda")
        scales = torch.full((rows,), float("nan"), device="cuda")
        given = torch.from_numpy(x).cuda()
        rounding(given, codes, scales)
        numbers, expected_scales = e4m3.round_rows(x)
        got = codes.view(torch.float8_e4m3fn).float().cpu().numpy()
        np.testing.assert_array_equal(got, e4m3.interleaved(numbers))
        np.testing.assert_array_equal(scales.cpu().numpy(), expected_scales)
        if rows < E4M3_ROWS:
            expected = x.astype(np.float64) @ arrays["exact"].T
        else:
            rounded = numbers.astype(np.float64) * expected_scales[:, None]
            expected = rounded @ arrays["decoded"].T
        expected = cases.finished(case, expected, arrays)
        y = torch.full(expected.shape, float("nan"), dtype=torch.float16, device="cuda")
        more = [torch.from_numpy(arrays["residual"][:rows]).cuda()] if case.residual else []
        linear(given, codes, scales, *weights, *more, y)
        torch.cuda.synchronize()
        difference = y.cpu().numpy().astype(np.float64) - expected
        error = np.linalg.norm(difference) / np.linalg.norm(expected)
        print(f"{case.key} M={rows}: {error:.2e}")
        assert error < (cases.TOLERANCE if rows < E4M3_ROWS else cases.E4M3_TOLERANCE)


def test_nan_stays_in_its_row(kernel):
    """NaN and Inf make the products of their rows NaN, and no others."""
    case = cases.E4M3_CASES[4]
    rounding, linear = kernel(build_rows, case.k), kernel(build_linear, case)
    arrays = cases.e4m3_arrays(case, seed=5)
    rows = 128  # enough for products in E4M3
    x = torch.from_numpy(arrays["x"][:rows]).cuda()
    x[3, 100], x[7, 5], x[9, 6] = float("nan"), float("inf"), float("-inf")
    x[11] = 0
    codes = torch.zeros(x.shape, dtype=torch.uint8, device="cuda")
    scales = torch.zeros(rows, device="cuda")
    y = torch.zeros(rows, case.n, dtype=torch.float16, device="cuda")
    rounding(x, codes, scales)
    weights = [torch.from_numpy(arrays[n]).cuda() for n in ("codes", "scales", "table")]
    linear(x, codes, scales, *weights, y)
    lost = torch.isnan(y)
    assert lost[[3, 7, 9]].all() and lost.sum() == 3 * case.n
    assert not y[11].any()


def test_model(tmp_path):
    """Prefill in E4M3 stays near decode in 16 bits, also behind a chunk of few rows."""
    name, quantization, head = MODEL
    folder = Path(PREBUILT) if PREBUILT else tmp_path
    if not PREBUILT:
        models.build(name, ARCH, folder, quantization, head)
    errors = models.check(models.RandomModel(folder, name))
    print(errors)
    assert max(errors.values()) < models.E4M3_TOLERANCE, errors


if __name__ == "__main__":
    target = Path(os.environ["AMX_TVM_GPU_KERNELS"])
    target.mkdir(parents=True, exist_ok=True)
    for one in cases.E4M3_CASES:
        build_linear(one, target / f"build_linear-{one.key}.so")
    for columns in sorted({one.k for one in cases.E4M3_CASES}):
        build_rows(columns, target / f"build_rows-{columns}.so")
    models.build(MODEL[0], ARCH, target, *MODEL[1:])
