"""A cache of few bits through the virtual machine, against attention over what it holds."""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm.formats.packing import get_layout
from amx_tvm.targets import host_options
from relax_passes.cache_spec import FORMATS, CacheSpec
from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cpu.packed_cache import Layout
from relax_passes.kernels.cpu.packed_cache.layout import PAGE
from tests.kernels.cpu_attention.reference import layers, plain

from .reference import Cache, mean, round_page, unpacked

MODELS = {
    "window": (layers(1, 4, 2, 64, plain(64), windows=(70,)), CacheSpec("amxfp4", centred=True)),
    "capped, sinks": (
        layers(1, 2, 1, 32, soft_cap=2.0, sinks=True),
        CacheSpec("int8", turned=False),
    ),
    "wide": (layers(1, 1, 1, 96, plain(64)), CacheSpec("nvfp4", newest=32, first=2, centred=True)),
    "small": (layers(1, 2, 2, 32), CacheSpec("amxfp4-e4m3", centred=True)),
}
PLAIN = {"kind": "llvm"}  # without a table instruction values are made by arithmetic
AVX2 = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"}
RUNS_AVX2 = TargetInfo.of(host_options()).has("avx2", "fma", "f16c")
needs_avx2 = pytest.mark.skipif(not RUNS_AVX2, reason="needs an AVX2 machine")
CASES = (
    ("window", None),
    ("capped, sinks", None),
    ("wide", None),
    ("small", PLAIN),
    pytest.param("small", AVX2, marks=needs_avx2),
)


@pytest.mark.parametrize(("model", "target"), CASES)
def test_attention_is_that_over_what_is_held(model, target):
    cache = Cache(*MODELS[model], target=target)
    for sequence in (0, 1):
        cache.pages.add(sequence)
    worst = [cache.forward({0: n}) for n in (1, 2, 37, 128, 1, 60, 1)]
    worst += [cache.forward({0: 1, 1: 1}), cache.forward({1: 9, 0: 70}), cache.forward({1: 1})]
    cache.pages.fork(0, 2, 100, cache.length(0))  # inside a page, far behind the newest
    cache.pages.fork(0, 3, cache.length(0), cache.length(0))
    worst += [cache.forward({2: 1, 0: 1, 3: 1}), cache.forward({3: 3, 2: 3})]
    cache.pages.pop(2, 60)  # into a page that it shares
    shared = cache.pages._tables[0][0]
    before = cache.pages._pages[shared].copy()
    worst += [cache.forward({2: 1}), cache.forward({2: 1, 0: 1})]
    np.testing.assert_array_equal(cache.pages._pages[shared], before)
    assert max(worst) < 5e-6


@pytest.mark.parametrize("better", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_the_oracles(name, better):
    centred = better and name != "int8"
    more = {"newest": PAGE, "turned": False, "four_over_six": better, "centred": centred}
    layout = Layout(CacheSpec(name, **more), 1, 1, 32)
    random = np.random.default_rng(3)
    x = random.standard_normal((PAGE, 2, 32), np.float32) + 0.5 * centred
    x *= np.exp2(random.integers(-12, 12, (PAGE, 2, 1))).astype(np.float32)
    x[5] = 0
    x[6] = np.abs(x[6])  # one sign alone
    x[7] = [0.25, -0.25] * 16  # ties
    x[8] *= 6e4 / np.abs(x[8]).max()
    x = x.astype(np.float16).astype(np.float32)
    block = round_page(layout, x)
    found = unpacked(layout, block, get_layout("tile16x32"))
    keys, values = x.transpose(1, 0, 2)
    if centred:
        total = np.zeros((1, 32), np.float32)
        for key in keys:
            total += key
        check(layout.format, total * np.float32(1 / PAGE), mean(layout, block))
        keys = keys - layout.format.dequantize(mean(layout, block))
    check(layout.format, keys, found[0])
    check(layout.format, values, found[1])


def check(fmt, given, got):
    """Compare stored codes and scales with the oracle's."""
    scale = np.ones(len(given), np.float32) if fmt.row_scaled else None
    expected = fmt.quantize(given, activation=True, tensor_scale=scale)
    np.testing.assert_array_equal(got.codes, expected.codes)
    for tensor, stored in expected.scales.items():
        np.testing.assert_array_equal(got.scales[tensor], stored)


def test_sizes():
    """At 128 channels a token takes 72 bytes in place of 256; 3.4 times the tokens at 4096."""
    layout = Layout(CacheSpec("amxfp4"), 32, 8, 128)
    assert layout.page_bytes == PAGE * 32 * 8 * 2 * 72
    float16 = 2 * 32 * 8 * 2 * 128
    assert 4096 * float16 / (4096 // PAGE * layout.page_bytes + layout.sequence_bytes) > 3.4
