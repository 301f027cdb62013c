"""Every instruction set's kernels: chosen by features, right in numbers, meant in instructions."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from cpu_oracle import HOST_INFO, Case, assembly, compile_func, kernel_func
from tvm.target import Target

from relax_passes.activation import FLOAT32, INT8, OUTLIERS, four_bit
from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.registry import linear_kernel
from relax_passes.spec import LinearSpec

HASWELL = {"kind": "llvm", "mcpu": "haswell", "num-cores": 2}
TARGETS = {
    "avx512": {"kind": "llvm", "mcpu": "znver4"},
    "avxvnni": {"kind": "llvm", "mcpu": "alderlake"},
    "avx2": HASWELL,
    "neon-i8mm": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-v1"},
    "neon-dotprod": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"},
    "neon": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"},
    "plain": {"kind": "llvm", "mcpu": "x86-64"},
}
MEANT = {
    "avx512": [r"vpermb\s.*%zmm", r"\bvpdpbusd\s.*%zmm", r"prefetcht0"],
    "avxvnni": [r"vpshufb\s.*%ymm", r"\bvpdpbusd\s.*%ymm"],
    "avx2": [r"vpshufb\s.*%ymm", r"vpmaddubsw\s.*%ymm", r"vpmaddwd\s.*%ymm"],
    "neon-dotprod": [r"\btbl\s+v\d+\.16b", r"\bsdot\s+v\d+\.4s", r"\bprfm\b"],
    "neon": [r"\btbl\s+v\d+\.16b", r"\bsmull2?\s+v\d+\.8h", r"\baddp\b", r"\bsaddlp\b|\bsadalp\b"],
}
SLOW = pytest.mark.slow
PANEL = {"panel_rows": 4, "panel_tiles": 2}  # from the fewest rows that a block takes
JOINED = replace(four_bit("amxfp4"), outliers=True)
WORDS = 4e-3  # where scales of either sign lie far apart (pair_words.py)
BANNED = {"neon": r"\bsdot\b", "avx2": r"vpdpbusd|%zmm", "avxvnni": "%zmm"}


@pytest.mark.parametrize("rule", TARGETS)
def test_features_choose_the_rule(rule):
    kernel = linear_kernel(LinearSpec("amxfp4", 32, 64, INT8, m=1), Target(TARGETS[rule]))
    assert kernel.rule == rule


@pytest.mark.parametrize("rule", MEANT)
def test_meant_instructions_are_there(rule):
    target = Target(TARGETS[rule])
    spec = LinearSpec("amxfp4", 32, 256, INT8, m=1)
    text = assembly(linear_kernel(spec, target).func, target)
    for pattern in MEANT[rule]:
        assert re.search(pattern, text), pattern
    if rule in BANNED:
        assert not re.search(BANNED[rule], text)


@pytest.mark.skipif(not HOST_INFO.has("avx2", "fma"), reason="needs an AVX2 machine")
@pytest.mark.parametrize("name", ["amxfp4", "mxfp4", "nvfp4", "int4", "int8"])
def test_avx2_numbers(name):
    target = Target(HASWELL)
    for activation in (INT8, FLOAT32, JOINED):
        spec = LinearSpec(name, 41, 100, activation, bias=True)
        case, func = Case(spec), kernel_func(spec, "avx2", target=target)
        for m in (1, 2, 7):
            assert case.error(func, m) < 2e-6, f"{activation} M={m}"


@pytest.mark.skipif(not HOST_INFO.has("avx2", "fma"), reason="needs an AVX2 machine")
@pytest.mark.parametrize("name", ["amxfp4", "mxfp4", "int4", pytest.param("nvfp4", marks=SLOW)])
def test_avx2_panels(name):
    """Whole and partly filled blocks of rows, panels and parts of K."""
    spec = LinearSpec(name, 41, 1100, OUTLIERS, bias=True)
    case, func = Case(spec), kernel_func(spec, "avx2", PANEL, Target(HASWELL))
    for m in (3, 4, 5, 6, 7, 8, 33):
        assert case.error(func, m) < 2e-6, f"M={m}"


@pytest.mark.skipif(not HOST_INFO.has("avx2", "fma"), reason="needs an AVX2 machine")
@pytest.mark.parametrize("name", ["amxfp4", "int4", "int8", pytest.param("nvfp4", marks=SLOW)])
def test_avx2_panels_of_floats(name):
    """The sums of a row are those of a block of rows, bit for bit."""
    spec = LinearSpec(name, 96, 1120, FLOAT32, silu_mul=True, residual=True)
    panel, blocks = (kernel_func(spec, "avx2", {"panel_rows": m}, Target(HASWELL)) for m in (4, 99))
    for m in (4, 9, 32):
        results = []
        for func in (panel, blocks):
            got, want = Case(spec).run(func, m)
            assert np.abs(got - want).max() < 2e-6 * np.abs(want).max(), f"M={m}"
            results.append(got)
        whole = m // 4 * 4  # one row alone scales its sums
        np.testing.assert_array_equal(results[0][:whole], results[1][:whole])


@pytest.mark.skipif(not HOST_INFO.has("avx2", "fma"), reason="needs an AVX2 machine")
@pytest.mark.parametrize("name", ["amxfp4", "mxfp4"])
def test_four_bits_on_both_sides_on_avx2(name):
    """x as integers (fp4_integers.py): one row, blocks of words and panels, exact in all."""
    spec = LinearSpec(name, 41, 1100, replace(four_bit(name), outliers=True), residual=True)
    case, func = Case(spec), kernel_func(spec, "avx2", target=Target(HASWELL))
    for m in (1, 3, 8, 33):
        assert case.error(func, m) < 2e-6, f"M={m}"


@pytest.mark.skipif(not HOST_INFO.has("avx2", "fma"), reason="needs an AVX2 machine")
def test_eight_bit_weights_are_words_on_avx2():
    """A block of eight rows, such a block and rows alone, panels with a partly filled block."""
    spec = LinearSpec("int8", 41, 1100, OUTLIERS, bias=True)
    case, func = Case(spec), kernel_func(spec, "avx2", target=Target(HASWELL))
    for m in (8, 11, 33):
        assert case.error(func, m) < 2e-6, f"M={m}"


@pytest.mark.skipif(not HOST_INFO.has("avx2", "fma"), reason="needs an AVX2 machine")
def test_avx2_panels_of_pairs():
    spec = LinearSpec("amxfp4", 96, 64, INT8, silu_mul=True, residual=True)
    case, func = Case(spec), kernel_func(spec, "avx2", PANEL, Target(HASWELL))
    for m in (4, 7):
        assert case.error(func, m) < 2e-6, f"M={m}"


@pytest.mark.skipif(not HOST_INFO.has("avx2", "fma"), reason="needs an AVX2 machine")
@pytest.mark.parametrize("name", ["amxfp4", "mxfp4", "int8"])
def test_the_largest_sums_fit_16_bits_on_avx2(name):
    """Every weight is the largest and every activation: 127, second bytes -128."""
    target = Target(HASWELL)
    spec = LinearSpec(name, 32, 2048, OUTLIERS)
    case, func = Case(spec), kernel_func(spec, "avx2", PANEL, target)
    for sign, x_sign in product((1, -1), (1, -1)):
        case.set_weight(np.full((32, 2048), 10.5 * sign, np.float32))
        x = np.full((9, 2048), x_sign, np.float32)
        x[:, 0] *= 40
        x[:, 1:32] *= 40 * 32384 / 32512
        case.draw = lambda m, x=x: x[:m].copy()
        for m in (1, 2, 9):
            assert case.error(func, m) < 2e-6, f"M={m}"


def scaled_pairs(rng, rows, k, scales):
    """Weights of groups whose two scales are of ``scales``: pairs [2, rows, groups] of E5M2."""
    magnitudes = rng.choice(np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6]), (rows, k // 32, 32))
    magnitudes[..., :2] = 6
    negative = rng.integers(0, 2, magnitudes.shape)
    negative[..., :2] = 0, 1
    values = np.where(
        negative, -magnitudes * scales[1][..., None], magnitudes * scales[0][..., None]
    )
    return values.reshape(rows, k).astype(np.float32)


@pytest.mark.skipif(not HOST_INFO.has("avx2", "fma"), reason="needs an AVX2 machine")
@pytest.mark.parametrize("lowest", [1, 4, 0x30])
def test_words_are_exact_where_exponents_are_near(lowest):
    """Of subnormal scales too: the bytes 1 to 3."""
    rng = np.random.default_rng(lowest)
    spec = LinearSpec("amxfp4", 32, 256, OUTLIERS)
    case, func = Case(spec), kernel_func(spec, "avx2", target=Target(HASWELL))
    stored = rng.integers(lowest, lowest + (15 if lowest == 1 else 16), (2, 32, 8))
    scales = (stored << 8).astype(np.uint16).view(np.float16).astype(np.float32)
    case.set_weight(scaled_pairs(rng, 32, 256, scales))
    for m in (8, 11, 13):
        assert case.error(func, m) < 2e-6, f"M={m}"


@pytest.mark.skipif(not HOST_INFO.has("avx2", "fma"), reason="needs an AVX2 machine")
def test_words_of_scales_far_apart_are_rounded():
    rng = np.random.default_rng(0)
    spec = LinearSpec("amxfp4", 32, 256, INT8)
    case, func = Case(spec), kernel_func(spec, "avx2", target=Target(HASWELL))
    small = 2.0 ** -rng.integers(5, 12, (1, 32, 8)) * rng.choice([1, 1.25, 1.5, 1.75], (1, 32, 8))
    case.set_weight(scaled_pairs(rng, 32, 256, np.concatenate([np.ones_like(small), small])))
    for m in (8, 13):
        assert 1e-6 < case.error(func, m) < 2 * WORDS, f"M={m}"  # every group is such


def test_words_are_multiplied_by_vpdpwssd_where_it_is():
    target = Target(TARGETS["avxvnni"])
    text = assembly(linear_kernel(LinearSpec("amxfp4", 32, 256, INT8, m=8), target).func, target)
    assert re.search(r"\{vex\}\s+vpdpwssd\s.*%ymm", text)
    assert "%zmm" not in text  # LLVM takes vpmaddwd and vpaddd where a chain is long
    panel = LinearSpec("amxfp4", 32, 256, INT8, m=64)
    assert re.search(r"\{vex\}\s+vpdpbusd\s", assembly(linear_kernel(panel, target).func, target))


def test_groups_stay_in_16_bits_on_avx2():
    target = Target(HASWELL)

    def count(text, name):
        return len(re.findall(rf"\b{name}\s", text))

    for m, rest in ((1, 0.5), (64, 0.25)):  # of the multiplications
        spec = LinearSpec("amxfp4" if m == 1 else "mxfp4", 32, 256, INT8, m=m)
        text = assembly(linear_kernel(spec, target).func, target)
        assert count(text, "vpmaddwd") <= rest * count(text, "vpmaddubsw")
        # Weights are loaded once for four rows of x, not again for each.
        assert m == 1 or count(text, "vpbroadcastd") >= 2 * count(text, "vpmaddwd")
    spec = LinearSpec("amxfp4", 32, 256, INT8, m=64)
    text = assembly(linear_kernel(spec, target).func, target)
    # Words of two vectors are loaded once for four rows of x.
    assert count(text, "vpmaddwd") >= 1.5 * count(text, "vpbroadcastd")


def test_eight_rows_on_avx512_keep_the_multiplier_for_products():
    target = Target(TARGETS["avx512"])

    def text(name):
        return assembly(
            linear_kernel(LinearSpec(name, 32, 256, OUTLIERS, m=8), target).func, target
        )

    merged = text("amxfp4")
    for pattern in (r"vpermb\s.*%zmm", r"vpternlog[dq]\s.*%zmm", r"vperm[it]2b\s.*%zmm"):
        assert re.search(pattern, merged), pattern
    # A compare a vector of codes, as a select by sign has, would take the port of the products.
    assert len(re.findall(r"vptestn?mb\s", merged)) == 0
    # Sums are scaled by exponents: conversions are left to second bytes and rare scales.
    assert len(re.findall(r"vsubps\s.*%zmm", merged)) >= 8
    assert "prefetcht1" in text("int8") and "prefetcht1" not in merged


@pytest.mark.skipif(not HOST_INFO.has("avx512vnni", "avx512vl"), reason="needs 256-bit vpdpbusd")
@pytest.mark.parametrize("name", ["amxfp4", "int8"])
def test_avx_vnni_numbers(name):
    # The same 256-bit instruction exists with AVX-512's encoding, which runs here.
    target = Target({**HASWELL, "mattr": ["+avx512vnni", "+avx512vl"]})
    info = TargetInfo.of(target)
    info = TargetInfo(info.kind, info.arch, info.features | {"avxvnni"} - {"avx512vnni"})
    spec = LinearSpec(name, 41, 100, INT8, residual=True)
    func = compile_func(linear_kernel(spec, info, PANEL, rule="avxvnni").func, target)
    for m in (1, 3, 7, 33):
        assert Case(spec).error(func, m) < 2e-6
