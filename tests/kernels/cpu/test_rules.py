"""The map of CPU linears: which kernel runs from how many rows of x on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tvm.target import Target

from relax_passes.activation import FLOAT32, OUTLIERS, four_bit
from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cpu.linear.rules import read_as
from relax_passes.kernels.registry import linear_kernel, row_kernels
from relax_passes.spec import LinearSpec

ZNVER4 = Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "znver4"})
AVX2 = Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"})
VNNI = Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "alderlake"})
A76 = Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"})
V1 = Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-v1"})
INT8 = LinearSpec("amxfp4", 64, 64, OUTLIERS)


def runs(spec, target=ZNVER4, **knobs):
    rule = linear_kernel(replace(spec, m=1), target).rule
    return {r.first: r.kernel for r in row_kernels(spec, target, rule, knobs)}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (INT8, {1: "direct", 4: "merged", 16: "panel-int8"}),
        (replace(INT8, format="nvfp4"), {1: "direct"}),
        (replace(INT8, experts=4), {1: "direct", 4: "merged"}),
        (replace(INT8, activation=FLOAT32), {1: "float32"}),
        (LinearSpec("none", 64, 64), {1: "dense"}),
        (replace(INT8, activation=four_bit("amxfp4")), {1: "direct", 32: "panel-w4a4"}),
        (
            LinearSpec("amxfp4-e4m3", 64, 64, four_bit("amxfp4-e4m3")),
            {1: "direct", 32: "panel-bf16"},
        ),
    ],
)
def test_every_kernel_has_its_rows(spec, expected):
    assert runs(spec) == expected


def test_rows_that_cannot_occur_are_left_out():
    assert runs(replace(INT8, m=1)) == {1: "direct"}
    assert runs(replace(INT8, m=8)) == {4: "merged"}
    assert runs(replace(INT8, m_max=15)) == {1: "direct", 4: "merged"}


def test_knobs_and_instructions_move_the_limits():
    assert runs(INT8, panel_rows=8) == {1: "direct", 4: "merged", 8: "panel-int8"}
    words = {1: "direct", 8: "merged-words", 12: "panel-words"}
    assert runs(INT8, AVX2) == words
    assert runs(INT8, AVX2, panel_rows=8) == {1: "direct", 8: "panel-words"}
    assert runs(replace(INT8, activation=replace(four_bit("amxfp4"), outliers=True)), AVX2) == words
    floats = {1: "float32", 12: "panel-float32"}
    assert runs(replace(INT8, activation=FLOAT32), AVX2) == floats
    assert runs(replace(INT8, activation=FLOAT32, k=65), AVX2) == {1: "float32"}
    assert runs(replace(INT8, format="mxfp4"), AVX2) == {1: "direct", 12: "panel-terms"}
    assert runs(INT8, VNNI) == {1: "direct", 8: "merged-words", 12: "panel-terms"}
    assert runs(replace(INT8, format="int8"), AVX2) == words
    assert runs(replace(INT8, format="int8"), VNNI) == {1: "direct"}
    for name in ("amxfp4", "int8"):
        assert runs(replace(INT8, format=name), A76) == {1: "direct", 4: "panel-bytes"}
        assert runs(replace(INT8, format=name), V1) == {1: "direct", 4: "panel-bytes"}
    assert runs(replace(INT8, experts=4), V1) == {1: "direct", 8: "merged-bytes"}


def test_a_chosen_kernel_says_what_it_runs():
    kernel = linear_kernel(replace(INT8, m=1), ZNVER4)
    assert [(r.first, r.kernel) for r in kernel.rows] == [(1, "direct")] and kernel.rows[0].why


def test_four_bit_activations_are_integers_without_avx512():
    scheme = four_bit("amxfp4", True)
    assert read_as(scheme, TargetInfo.of(ZNVER4)) == scheme
    for target in (AVX2, VNNI):
        assert read_as(scheme, TargetInfo.of(target)) == replace(scheme, outliers=True)
        for name in ("nvfp4", "amxfp4-e4m3"):  # groups of 16, mantissas of four bits
            assert read_as(four_bit(name), TargetInfo.of(target)) == four_bit(name)
