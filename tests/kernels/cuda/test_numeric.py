"""Results on the GPU that is here: linears, row kernels and whole tiny models.

With AMX_TVM_GPU_KERNELS=FOLDER the kernels come from there and neither TVM's compiler nor nvcc is
needed; the folder is made, anywhere, by

    AMX_TVM_GPU_KERNELS=FOLDER python tests/kernels/cuda/test_numeric.py sm_90a
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from amx_tvm import formats  # noqa: E402
from benchmarks.gpu import cases, harness, models  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PREBUILT = os.environ.get("AMX_TVM_GPU_KERNELS")
FOUR_BIT = tuple(n for n in formats.names() if formats.get(n).rule)
ROW_CASES = [(name, k, norm) for name in ("", *FOUR_BIT) for k in (576, 4096) for norm in (0, 1)]
EPS = 1e-5
# Format of the linears, and of the head: its own, 8.5 bits, or none.
SCHEMES = (("amxfp4", "amxfp4"), ("nvfp4-w4a4", "none"), ("amxfp4", "auto"), ("amxfp4", "none"))
SEVERAL = "sm_80+sm_89+sm_90a"


def row_key(name: str, k: int, norm: int) -> str:
    return f"rows_{name or 'float16'}_{k}_{norm}".replace("-", "_")


def row_function(name: str, k: int, norm: int):
    from relax_passes.kernels.cuda.rows.kernels import row_kernel

    return row_kernel(k, None, norm_eps=EPS if norm else None, format_name=name)


def build(function, path: Path, arch: str | None) -> None:
    import tvm

    from amx_tvm.targets import resolve

    target = resolve(f"cuda:{arch or ''}").tvm
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    tvm.compile(module, target=target).export_library(str(path))


def architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def library(key: str, make, tmp_path: Path):
    """Load a kernel from the prebuilt folder, or build it here."""
    if PREBUILT:
        harness.load_runtime(os.environ.get("AMX_TVM_RUNTIME"))
        return harness.load_function(Path(PREBUILT) / f"{key}.so")
    pytest.importorskip("tvm")
    build(make(), tmp_path / "kernel.so", None)
    return harness.load_function(tmp_path / "kernel.so")


@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.key)
def test_linear(case, tmp_path):
    function = library(case.key, lambda: cases.build_function(case, architecture()), tmp_path)
    errors = cases.run_case(function, cases.reference(case, seed=1))
    assert all(error < cases.TOLERANCE for error in errors.values()), errors


@pytest.mark.parametrize("name,k,norm", ROW_CASES)
def test_rows(name, k, norm, tmp_path):
    """RMSNorm, and rounding to four bits: what the format's NumPy code says, bit for bit."""
    function = library(row_key(name, k, norm), lambda: row_function(name, k, norm), tmp_path)
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((5, k)) * rng.choice([0.01, 1, 8], (5, 1))).astype(np.float16)
    x[:, ::97] *= 6
    x[1, 64:96] = 0
    weight = (1 + 0.2 * rng.standard_normal(k)).astype(np.float16)
    expected = x.astype(np.float32)
    if norm:
        inverse = 1 / np.sqrt((expected.astype(np.float64) ** 2).mean(1, keepdims=True) + EPS)
        expected = expected * inverse.astype(np.float32) * weight.astype(np.float32)
    if name:
        expected = formats.get(name).quantize_dequantize(expected, activation=True)
    y = torch.full(x.shape, float("nan"), dtype=torch.float16, device="cuda")
    arguments = [torch.from_numpy(a).cuda() for a in ((x, weight) if norm else (x,))]
    function(*arguments, y)
    torch.cuda.synchronize()
    got = y.cpu().numpy()
    assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected)
    if not norm:
        np.testing.assert_array_equal(got, expected.astype(np.float16))


@pytest.mark.parametrize("case", cases.W4A4_CASES, ids=lambda c: c.key)
def test_w4a4_linear(case, tmp_path):
    """Rounding kernel and linear together against the fake-quantized product in float64."""
    rounding = library(
        row_key(case.format, case.k, 0), lambda: row_function(case.format, case.k, 0), tmp_path
    )
    linear = library(case.key, lambda: cases.build_function(case, architecture()), tmp_path)
    rng = np.random.default_rng(3)
    arrays, dense = cases.weights(case, rng)
    weights = [torch.from_numpy(arrays[n]).cuda() for n in cases.ORDER if n in arrays]
    for rows in (1, 4, 33, 300):
        x = rng.standard_normal((rows, case.k)).astype(np.float16)
        x[:, ::97] *= 6
        fake = formats.get(case.format).quantize_dequantize(x.astype(np.float32), activation=True)
        expected = fake.astype(np.float64) @ dense.T
        rounded = torch.full(x.shape, float("nan"), dtype=torch.float16, device="cuda")
        y = torch.full(expected.shape, float("nan"), dtype=torch.float16, device="cuda")
        rounding(torch.from_numpy(x).cuda(), rounded)
        linear(rounded, *weights, y)
        torch.cuda.synchronize()
        difference = y.cpu().numpy().astype(np.float64) - expected
        error = np.linalg.norm(difference) / np.linalg.norm(expected)
        print(f"{case.key} M={rows}: {error:.2e}")
        assert error < 1e-3


def model_folder(name: str, quantization: str, head: str, tmp_path: Path) -> Path:
    """Where a tiny model is, built here unless it is prebuilt."""
    if PREBUILT:
        return Path(PREBUILT) / f"{quantization}-{head}"
    pytest.importorskip("tvm")
    models.build(name, architecture(), tmp_path, quantization, head)
    return tmp_path


@pytest.mark.parametrize("quantization,head", SCHEMES)
@pytest.mark.parametrize("name", models.TINY)
def test_model(name, quantization, head, tmp_path):
    """Decode, fork and batch agree with prefill, whose kernels share no code with theirs."""
    model = models.RandomModel(model_folder(name, quantization, head, tmp_path), name)
    errors = models.check(model)
    # rounding x to four bits turns the last bit of float16 into a step of a code
    limit = models.TOLERANCE if quantization == "amxfp4" else 0.1
    assert max(errors.values()) < limit, errors
    with model.engine.sequence() as sequence:
        logits = sequence.append(model.tokens[:33])
        for _ in range(40):  # over the end of a page, the next step begun ahead
            token = sequence.choose(int(np.argmax(logits)))
            sequence.rollback(1)
            logits = sequence.append([int(np.argmax(logits))])
            assert token == int(np.argmax(logits))


def test_two_engines_of_one_library(tmp_path):
    """100 generations of each, in turn and then at once: all as an engine that is alone gives."""
    folder = model_folder("tiny-llama", *SCHEMES[0], tmp_path)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(100, 1000, n).tolist() for n in (5, 17, 64, 130, 33)]

    def text(model: models.RandomModel, i: int) -> list[int]:
        return model.engine.generate(prompts[i % 5], 24, ignore_eos=True).token_ids

    first = models.RandomModel(folder, "tiny-llama")
    alone = [text(first, i) for i in range(5)]
    engines = (first, models.RandomModel(folder, "tiny-llama"))
    for i in range(100):
        for model in engines:
            assert text(model, i) == alone[i % 5]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda model: [text(model, i) for i in range(100)], engines)
    assert all(made == alone * 20 for made in found)


def test_model_for_several_architectures(tmp_path):
    """The driver takes the machine code for this GPU out of a library that holds three."""
    folder = Path(PREBUILT) / "several" if PREBUILT else tmp_path
    if not PREBUILT:
        pytest.importorskip("tvm")
        models.build("tiny-llama", SEVERAL, folder, "amxfp4")
    errors = models.check(models.RandomModel(folder, "tiny-llama"))
    assert max(errors.values()) < models.TOLERANCE, errors


if __name__ == "__main__":
    target, folder = sys.argv[1], Path(os.environ["AMX_TVM_GPU_KERNELS"])
    folder.mkdir(parents=True, exist_ok=True)
    for one in dict.fromkeys((*cases.CASES, *cases.W4A4_CASES)):
        build(cases.build_function(one, target), folder / f"{one.key}.so", target)
    for row_case in ROW_CASES:
        build(row_function(*row_case), folder / f"{row_key(*row_case)}.so", target)
    for scheme in SCHEMES:
        for tiny in models.TINY:
            models.build(tiny, target, folder / "-".join(scheme), *scheme)
    models.build("tiny-llama", SEVERAL, folder / "several", "amxfp4")
