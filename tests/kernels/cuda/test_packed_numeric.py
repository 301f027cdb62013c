"""The cache of few bits on the GPU that is here: attention over what the NumPy oracle stores.

With AMX_TVM_GPU_KERNELS=FOLDER the kernels come from there; the folder is made, anywhere, by

    AMX_TVM_GPU_KERNELS=FOLDER python tests/kernels/cuda/test_packed_numeric.py sm_90a
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from packed_cache import Cache, attention  # noqa: E402

from benchmarks.gpu import batches, harness, models  # noqa: E402
from relax_passes.cache_spec import FORMATS, CacheSpec  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PREBUILT = os.environ.get("AMX_TVM_GPU_KERNELS")
LAYERS = 2
FEW = ("amxfp4", "amxfp4", "amxfp4")  # formats of linears, head, keys and values


def spec():
    return attention(32, 8, 128)


def build(name: str, path: Path, arch: str) -> None:
    import tvm
    from packed_blocks import functions

    from amx_tvm.targets import resolve

    made = functions((spec(),) * LAYERS, CacheSpec(name), arch)
    module = tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in made.items()})
    tvm.compile(module, target=resolve(f"cuda:{arch}").tvm).export_library(str(path))


class Device:
    """The kernels of a library over arrays of the host: copied there before, and back behind."""

    def __init__(self, path: Path):
        self._functions = {n: harness.load_function(path, n) for n in NAMES}
        self._held: list = []

    def hold(self, arrays: tuple) -> None:
        """Keep what the kernels share between calls on the device."""
        self._arrays = arrays
        state, *tensors = self._held = [torch.from_numpy(a).cuda() for a in arrays]
        self._functions["setup"](*tensors, state)

    def begin(self, m: int) -> None:
        for array, tensor in zip(self._arrays[1:4], self._held[1:4], strict=True):
            tensor.copy_(torch.from_numpy(array))  # what forks copied, and what is told
        token = torch.zeros((m, 1, 4), dtype=torch.float16, device="cuda")
        self._functions["begin"](token, self._held[0], self._held[3], token.clone())
        self.fetch()

    def fetch(self) -> None:
        for array, tensor in zip(self._arrays, self._held, strict=True):
            array[...] = tensor.cpu().numpy()

    def batch(self, qkv, sinks, out, layer, m) -> None:
        given, result = (torch.from_numpy(a).cuda() for a in (qkv, out))
        token = torch.zeros((m, 1, 4), dtype=torch.float16, device="cuda")
        self._functions["batch"](given, token, self._held[0], layer, result)
        out[...] = result.cpu().numpy()
        self.fetch()

    def prefill(self, qkv, q, k, v, sinks, out, layer, m) -> None:
        given, result = (torch.from_numpy(a).cuda() for a in (qkv[:m], out[:m]))
        parts = [torch.from_numpy(a).cuda() for a in (q, k, v)]
        token = torch.zeros((m, 1, 4), dtype=torch.float16, device="cuda")
        self._functions["store"](given, token, self._held[0], layer, *parts)
        self._functions["prefill"](*parts, token, self._held[0], layer, result)
        out[:m] = result.cpu().numpy()
        for array, part in zip((q, k, v), parts, strict=True):
            array[...] = part.cpu().numpy()
        self.fetch()


NAMES = ("setup", "begin", "batch", "store", "prefill")


@pytest.mark.parametrize("name", FORMATS)
def test_attention(name, tmp_path):
    """Chunks, steps of one, few and many sequences, a rollback, forks; errors and stored bits."""
    path = Path(PREBUILT or tmp_path) / f"packed_{name}.so"
    if PREBUILT:
        harness.load_runtime(os.environ.get("AMX_TVM_RUNTIME"))
    else:
        pytest.importorskip("tvm")
        major, minor = torch.cuda.get_device_capability()
        build(name, path, f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else ""))
    cache = Cache(spec(), CacheSpec(name), Device(path), LAYERS, pages=400, places=44)
    every = range(40)
    for sequence in every:
        cache.add(sequence)
    errors = {"prompts": cache.forward({s: 1 + 11 * s for s in every[:19]} | {19: 900})}
    errors["more prompts"] = cache.forward({s: 3 + 5 * s for s in every[20:]})
    errors["one"] = cache.forward({19: 1})
    errors["few"] = max(cache.forward({s: 1 for s in (3, 19, 7, 12)}) for _ in range(3))
    errors["many"] = max(cache.forward(dict.fromkeys(every, 1)) for _ in range(3))
    cache.rollback(19, 60)
    errors["chunks"] = cache.forward({19: 80, 3: 2, 11: 130})
    errors["again"] = cache.forward(dict.fromkeys(every, 1))
    # at a page's end, inside a page, among the newest tokens, and a fork's fork
    for parent, child, position in ((19, 40, 640), (19, 41, 700), (19, 42, 900), (41, 43, 3)):
        cache.fork(parent, child, position)
    every = range(44)
    errors["forks"] = cache.forward(dict.fromkeys(every, 1))
    errors["chunks of forks"] = cache.forward({41: 5, 19: 3, 42: 70, 43: 2})
    errors["forks again"] = cache.forward(dict.fromkeys(every, 1))
    print(name, {k: f"{v:.1e}" for k, v in errors.items()})
    assert max(errors.values()) < 1e-3, errors
    different = [cache.check_bits(sequence) for sequence in every]
    print(name, "groups of another scale, of equal error:", sum(different))
    assert sum(different) < 50  # of a million


@pytest.mark.parametrize("name", models.TINY)
def test_model(name, tmp_path):
    """Rows of a step, forked and rolled back ones too, are what each sequence alone gives."""
    folder = Path(PREBUILT or tmp_path) / "models"
    if not PREBUILT:
        pytest.importorskip("tvm")
        major, minor = torch.cuda.get_device_capability()
        arch = f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
        models.build(name, arch, folder, *FEW)
    model = models.RandomModel(folder, name, sequences=16, tokens=16 * 1024)
    errors = batches.check(model, sizes=(7,))
    # a step ahead that is taken back leaves one token fewer in 16 bits
    kept = {key: error for key, error in errors.items() if "choices" not in key}
    assert max(kept.values()) < batches.TOLERANCE, errors


if __name__ == "__main__":
    Path(PREBUILT).mkdir(parents=True, exist_ok=True)
    for found in FORMATS:
        build(found, Path(PREBUILT) / f"packed_{found}.so", sys.argv[1])
    for tiny in models.TINY:
        models.build(tiny, sys.argv[1], Path(PREBUILT) / "models", *FEW)
