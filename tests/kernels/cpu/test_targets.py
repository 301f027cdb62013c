"""Every instruction set's kernels: chosen by features, right in numbers, meant in instructions."""

from __future__ import annotations

import re

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
    for activation in (INT8, FLOAT32, four_bit("amxfp4")):
        spec = LinearSpec(name, 41, 100, activation, bias=True)
        case, func = Case(spec), kernel_func(spec, "avx2", target=target)
        for m in (1, 2, 7):
            assert case.error(func, m) < 2e-6, f"{activation} M={m}"


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
    func = compile_func(linear_kernel(spec, info, rule="avxvnni").func, target)
    for m in (1, 7):
        assert Case(spec).error(func, m) < 2e-6
