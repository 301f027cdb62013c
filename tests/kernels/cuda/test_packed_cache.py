"""The cache of few bits on CUDA: what it stores and what attention makes of it, on the CPU."""

from __future__ import annotations

import pytest

tvm = pytest.importorskip("tvm")

from cuda_compiled import compile_functions, needs_nvcc  # noqa: E402
from packed_blocks import functions, library  # noqa: E402
from packed_cache import Cache, attention  # noqa: E402

from amx_tvm.errors import ModelError  # noqa: E402
from relax_passes.cache_spec import FORMATS, CacheSpec  # noqa: E402
from relax_passes.kernels.cuda.packed_cache import items  # noqa: E402
from relax_passes.kernels.cuda.packed_cache.layout import check  # noqa: E402

ONE, TWO, FORK = range(3)


@needs_nvcc
@pytest.mark.parametrize("name", FORMATS)
def test_attention_reads_what_the_oracle_says(name, tmp_path):
    """Prompts, steps of one and of several, a rollback and a fork; pages hold the oracle's bits."""
    spec, shape = CacheSpec(name), attention()
    cache = Cache(shape, spec, library((shape,) * 2, spec, tmp_path), 2)
    cache.add(ONE)
    cache.add(TWO)
    errors = [cache.forward({ONE: 3}), cache.forward({ONE: 90, TWO: 21})]
    errors += [cache.forward({ONE: 1, TWO: 1}) for _ in range(3)]
    cache.rollback(ONE, 20)
    errors += [cache.forward({ONE: 1, TWO: 1}), cache.forward({ONE: 30}), cache.forward({ONE: 1})]
    cache.fork(ONE, FORK, 70)
    errors += [cache.forward({FORK: 1, ONE: 1, TWO: 1}), cache.forward({FORK: 2, TWO: 60})]
    errors.append(cache.forward({TWO: 1, FORK: 1}))
    assert max(errors) < 1e-3, errors
    assert cache.counted._exact[ONE] > 40
    assert cache.check_bits(ONE) == 0


@needs_nvcc
@pytest.mark.parametrize(
    "shape,spec",
    [
        ({"heads": 8, "kv_heads": 2, "d": 128, "window": 40, "sinks": True, "soft_cap": 5.0}, {}),
        ({"heads": 32, "kv_heads": 2}, {"turned": False, "newest": 16, "first": 0}),
    ],
)
def test_other_attention(shape, spec, tmp_path):
    """Windows, sinks, caps, more queries of a head; without what keeps rounding accurate."""
    cache_spec, one = CacheSpec("amxfp4", **spec), attention(**shape)
    cache = Cache(one, cache_spec, library((one,), cache_spec, tmp_path), 1)
    cache.add(ONE)
    cache.add(TWO)
    errors = [cache.forward({ONE: 75, TWO: 2}), cache.forward({ONE: 1, TWO: 1})]
    errors += [cache.forward({ONE: 20}), cache.forward({ONE: 1})]
    assert max(errors) < 1e-3, errors


@needs_nvcc
def test_parts_of_a_sequence_meet(tmp_path, monkeypatch):
    """A sequence of several items, beside one of a single item."""
    monkeypatch.setattr(items, "SHORTEST", 4)
    spec, shape = CacheSpec("amxfp4"), attention(8, 1, sinks=True)
    cache = Cache(shape, spec, library((shape,), spec, tmp_path), 1)
    cache.add(ONE)
    cache.add(TWO)
    errors = [cache.forward({ONE: 200, TWO: 5})]
    errors += [cache.forward({ONE: 1, TWO: 1}) for _ in range(2)]
    found = cache.work.reshape(-1, 8)[:8, 4] >> 16  # the items' parts
    assert found.max() > 3
    assert max(errors) < 1e-3, errors


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_kernels_compile(arch):
    specs = (attention(32, 8, 128),) * 2
    made = compile_functions(functions(specs, CacheSpec("amxfp4"), arch), arch)
    text = made.ptx
    assert "mma.sync.aligned.m16n8k16" in text and "ldmatrix.sync.aligned.m8n8.x4.trans" in text
    assert ("griddepcontrol.wait" in text) == (arch != "sm_80")
    spilled = {k: r.spilled for k, r in made.resources().items() if k.startswith("batch")}
    assert set(spilled.values()) == {0}, spilled


@pytest.mark.parametrize(
    "d,more,message",
    [
        (96, {}, "heads of 96 channels cannot be kept as amxfp4 on GPUs"),
        (320, {}, "heads of 320"),
        (128, {"newest": 40}, "40 newest and 4 first"),
        (128, {"first": 5}, "48 newest and 5 first"),
    ],
)
def test_what_has_no_kernels_is_refused(d, more, message):
    with pytest.raises(ModelError, match=message):
        check(CacheSpec("amxfp4", **more), d)
