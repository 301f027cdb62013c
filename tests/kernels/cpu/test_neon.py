"""Arm's kernels: right in numbers under emulation, and free of what costs cycles."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from cpu_oracle import HOST, Case, assembly, compile_func, empty, tensors
from emulated import Emulated, needs_emulator
from test_chain import LayerInputs, layer
from test_targets import TARGETS, scaled_pairs
from tvm.target import Target

from relax_passes.activation import INT8, OUTLIERS, four_bit
from relax_passes.kernels.registry import chain_kernel, linear_kernel
from relax_passes.spec import LinearSpec

DOT = Target(TARGETS["neon-dotprod"])
MATRIX = Target(TARGETS["neon-i8mm"])
PANEL, BLOCKS = {"panel_rows": 4}, {"panel_rows": 99}


def emulated(spec, folder, target=DOT, knobs=PANEL):
    cpu = "cortex-a76" if target is DOT else "max"
    return Emulated(linear_kernel(spec, target, knobs).func, target, cpu, folder)


@needs_emulator
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("amxfp4", DOT),
        ("amxfp4", MATRIX),
        pytest.param("int8", MATRIX, marks=pytest.mark.slow),
        *(pytest.param(n, DOT, marks=pytest.mark.slow) for n in ("mxfp4", "int4", "int8")),
    ],
)
def test_numbers(name, target, tmp_path):
    """Blocks of few rows, whole and partly filled panels, two parts of K."""
    spec = LinearSpec(name, 41, 2100, OUTLIERS, bias=True)
    case, func = Case(spec), emulated(spec, tmp_path, target)
    for m in (1, 3, 4, 7, 33):
        rounded = name == "amxfp4" and m >= 4  # where the two scales of a group are far apart
        assert case.error(func, m) < (2e-3 if rounded else 2e-6), f"M={m}"


@needs_emulator
@pytest.mark.parametrize("target", [DOT, MATRIX])
def test_panels_of_pairs(target, tmp_path):
    spec = LinearSpec("mxfp4", 96, 64, INT8, silu_mul=True, residual=True, m=7)
    assert Case(spec).error(emulated(spec, tmp_path, target), 7) < 2e-6


@needs_emulator
@pytest.mark.parametrize(("target", "knobs"), [(DOT, PANEL), (DOT, BLOCKS), (MATRIX, BLOCKS)])
def test_merged_bytes_are_exact_where_exponents_are_near(target, knobs, tmp_path):
    """The two exponents of a group are one apart at most, some scales are subnormal.

    13 rows are a panel, or a block of eight rows, one of four and one of one.
    """
    spec = LinearSpec("amxfp4", 32, 256, OUTLIERS, m=13)
    case, func = Case(spec), emulated(spec, tmp_path, target, knobs)
    rng = np.random.default_rng(0)
    for lowest in (1, 4, 0x30):
        stored = rng.integers(lowest, lowest + (7 if lowest == 1 else 8), (2, 32, 8))
        if lowest != 1:
            stored = stored & ~3 | rng.integers(0, 4, stored.shape)
        scales = (stored << 8).astype(np.uint16).view(np.float16).astype(np.float32)
        case.set_weight(scaled_pairs(rng, 32, 256, scales))
        assert case.error(func, 13) < 2e-6, f"bytes from {lowest}"


@needs_emulator
@pytest.mark.parametrize("name", ["amxfp4", "int8"])
def test_the_largest_sums(name, tmp_path):
    """Sums of the largest weights and activations stay exact in the bits of a float32."""
    spec = LinearSpec(name, 32, 256, OUTLIERS, m=5)
    case, func = Case(spec), emulated(spec, tmp_path)
    for sign in (1, -1):
        case.set_weight(np.full((32, 256), 10.5 * sign, np.float32))
        x = np.full((5, 256), -sign, np.float32)
        x[:, 0] *= 40
        x[:, 1:32] *= 40 * 32384 / 32512
        case.draw = lambda m, x=x: x[:m].copy()
        assert case.error(func, 5) < 2e-6


@pytest.mark.parametrize(
    ("core", "product", "count"),
    [
        ("cortex-a76", r"\bsdot\s.*\.4b\[[0-3]\]", 64),  # 4 rows of x, 2 vectors of W, 8 steps
        ("apple-m1", r"\bsdot\s.*\.4b\[[0-3]\]", 64),
        ("neoverse-v1", r"\bsmmla\s", 32),  # 2 pairs of x, 4 of W, 4 steps
    ],
)
def test_the_products_of_a_panel_are_registers_alone(core, product, count):
    """Rows of x are lanes or pairs, and the sums of a block are in registers."""
    target = Target({**TARGETS["neon-dotprod"], "mcpu": core})
    text = assembly(linear_kernel(LinearSpec("amxfp4", 32, 256, INT8, m=64), target).func, target)
    lines = text.splitlines()
    at = [i for i, line in enumerate(lines) if re.search(product, line)]
    assert len(at) == len(re.findall(r"\b(?:sdot|smmla)\s", text)) and len(at) % count == 0
    for first in range(0, len(at), count):
        block = lines[at[first] : at[first + count - 1]]
        # LLVM 19 keeps one of 32 registers on the stack for Neoverse V1.
        assert sum(bool(re.search(r"\bq\d+, \[sp", line)) for line in block) <= 2


@needs_emulator
@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("amxfp4", four_bit("amxfp4")),
        ("nvfp4", OUTLIERS),
        *(pytest.param(n, INT8, marks=pytest.mark.slow) for n in ("amxfp4-pot", "amxfp4-e4m3")),
    ],
)
def test_numbers_without_panels(name, activation, tmp_path):
    spec = LinearSpec(name, 41, 100, activation, bias=True, m_max=3)
    case, func = Case(spec), emulated(spec, tmp_path)
    for m in (1, 3):
        assert case.error(func, m) < 2e-6, f"M={m}"


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize("target", [DOT, MATRIX])
def test_a_chain(target, tmp_path):
    """What a layer's linears make on this machine, but for rounding: rows apart and in blocks."""
    spec = replace(layer(), kept=(False, False, False, True))
    case = LayerInputs(spec)
    here = compile_func(chain_kernel(spec, HOST, [None] * 4).func)
    cpu = "cortex-a76" if target is DOT else "max"
    there = Emulated(chain_kernel(spec, target, [None] * 4).func, target, cpu, tmp_path)
    for m in (1, 3, 8, 13):
        x, residual = case.inputs(m)
        given = case.arguments(x, residual)
        want, got = (empty((m, 80), "float16") for _ in range(2))
        here(*tensors(*given), want)
        there(*tensors(*given), got)
        want, got = (y.numpy().astype(np.float64) for y in (want, got))
        assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want), f"M={m}"


@needs_emulator
def test_scales_of_one_row_are_exact_at_both_ends(tmp_path):
    """E5M2 from its least subnormal number to its largest one, and signs that do not occur."""
    spec = LinearSpec("amxfp4", 32, 256, INT8, m=1)
    case, func = Case(spec), emulated(spec, tmp_path)
    rng = np.random.default_rng(0)
    for lowest, highest in ((1, 4), (0x78, 0x7C)):
        stored = rng.integers(lowest, highest, (2, 32, 8))
        scales = (stored << 8).astype(np.uint16).view(np.float16).astype(np.float32)
        case.set_weight(scaled_pairs(rng, 32, 256, scales))
        assert case.error(func, 1) < 2e-6, f"bytes from {lowest}"
    case.set_weight(np.abs(scaled_pairs(rng, 32, 256, scales)))
    assert case.error(func, 1) < 2e-6


@pytest.mark.parametrize("core", ["neoverse-v1", "apple-m1"])
def test_one_row_looks_up_and_multiplies_by_lanes(core):
    """32 lookups and 64 sdot for a tile and group; no row of x is repeated in a register."""
    target = Target({**TARGETS["neon-dotprod"], "mcpu": core})
    text = assembly(linear_kernel(LinearSpec("amxfp4", 32, 2048, INT8, m=1), target).func, target)
    assert len(re.findall(r"\btbl\s", text)) == 32 and "ld1r" not in text
    assert len(re.findall(r"\bsdot\s.*\.4b\[", text)) == len(re.findall(r"\bsdot\s", text)) == 64
