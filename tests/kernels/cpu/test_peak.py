"""The loops that measure a CPU's arithmetic: nothing but products, of the quickest instruction."""

from __future__ import annotations

import re

import pytest
from cpu_oracle import assembly

from amx_tvm.bench.arithmetic import peak_operations
from amx_tvm.targets import resolve
from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cpu.linear.rules import isa_of
from relax_passes.kernels.cpu.peak import STEPS, byte_products, float_products

# Target: the instruction that multiplies bytes, its operations, and that for float32.
INSTRUCTIONS = {
    "x86-64-v4+vnni": ("vpdpbusd", 128, r"vfmadd\w+ps", 32),
    "x86-64-v3": ("vpmaddubsw", 64, r"vfmadd\w+ps", 16),
    "aws/graviton3": ("smmla", 64, "fmla", 8),
    "aws/graviton2": ("sdot", 32, "fmla", 8),
}


def innermost(text, instruction):
    """The loop that has the instruction, without directives."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not re.match(r"\.(?!LBB)|//", line)]
    products = [i for i, line in enumerate(lines) if re.match(rf"{instruction}\b", line)]
    start = max(i for i in range(products[0]) if lines[i].endswith(":"))
    end = min(i for i in range(products[-1], len(lines)) if re.match(r"j|b\.|cbn?z", lines[i]))
    return lines[start:end], len(products)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_the_loop_is_products(name):
    target = resolve(name).tvm
    isa = isa_of(TargetInfo.of(target))
    wanted = INSTRUCTIONS[name]
    for peak, instruction, operations in (
        (byte_products(isa), *wanted[:2]),
        (float_products(isa), *wanted[2:]),
    ):
        loop, products = innermost(assembly(peak.func, target), instruction)
        assert peak.operations == STEPS * operations * 2 * isa.block[0]
        assert products % (2 * isa.block[0]) == 0
        assert not any("rsp" in line or "[sp" in line for line in loop)  # nothing is spilled
        assert len(loop) <= 3 * products


def test_this_machine_s():
    both = [peak_operations(1, exact, seconds=0) for exact in (False, True)]
    assert all(1e8 < found < 1e14 for found in both)
