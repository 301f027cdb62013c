"""The kernels compile for other processors, with the instructions that they are meant to have."""

import re
from functools import cache

import pytest
import tvm

from relax_passes.kernels.cpu.attention import KVCacheConfig, kernels
from relax_passes.tir_pipeline import PIPELINE

from .reference import layers, plain

NEON = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}
RISCV = {
    "kind": "llvm",
    "mtriple": "riscv64-linux-gnu",
    "mcpu": "generic-rv64",
    "mattr": ["+m", "+a", "+f", "+d", "+c"],
    "mabi": "lp64d",
}
TARGETS = {
    "avx512": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v4"},
    "avx2": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"},
    "sse": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"},
    "neon": NEON,
    "riscv": RISCV,
}
# The instruction of an inner loop of scores, operands in registers of the right width.
MULTIPLY_ADD = {
    "avx512": r"vfmadd\d+ps.*zmm",
    "avx2": r"vfmadd\d+ps.*ymm",
    "sse": r"mulps.*xmm",
    "neon": r"fmla\s+v\d+\.4s",
    "riscv": r"fmadd\.s",
}
HALF = {"avx512": r"vcvtph2ps.*zmm", "avx2": r"vcvtph2ps.*ymm", "neon": r"fcvtl2?\s"}


@cache
def assembly(name, config, key):
    target = tvm.target.Target(TARGETS[key])
    function = kernels(config, target)[name].with_attr("global_symbol", name)
    return tvm.compile(
        tvm.IRModule({name: function}), target, tir_pipeline=PIPELINE
    ).mod.inspect_source("asm")


def spills(text):
    """Vectors that are stored to the stack inside innermost loops of products (not of exp2)."""
    blocks = re.split(r"\n(\.LBB\d+_\d+):", text)
    worst, loops = 0, 0
    for label, body in zip(blocks[1::2], blocks[2::2], strict=True):
        body = body[: m.end()] if (m := re.search(rf"\s{re.escape(label)}\b", body)) else ""
        if len(re.findall(r"vfmadd|fmla", body)) >= 12 and not re.search(r"vmaxps|fmax", body):
            stores = r"vmov[ua]ps\s+%[yz]mm\d+, -?\d*\(%r[sb]p\)|st[rp]\s+q\d+,.*\[sp"
            worst = max(worst, len(re.findall(stores, body)))
            loops += 1
    assert loops
    return worst


@pytest.mark.parametrize("key", TARGETS)
@pytest.mark.parametrize("name", ["decode", "prefill_paged"])
def test_multiply_adds(name, key):
    text = assembly(name, KVCacheConfig(layers(1, 9, 3, 64, plain(64))), key)
    assert len(re.findall(MULTIPLY_ADD[key], text)) >= 12


@pytest.mark.parametrize("key", ["avx512", "avx2", "neon"])
@pytest.mark.parametrize("name", ["decode", "prefill_paged"])
def test_inner_loops_keep_their_accumulators(name, key):
    assert spills(assembly(name, KVCacheConfig(layers(1, 9, 3, 64, plain(64))), key)) == 0


@pytest.mark.parametrize("key", HALF)
def test_half_precision_pages_are_converted_in_vectors(key):
    text = assembly("decode", KVCacheConfig(layers(1, 9, 3, 64, plain(64)), dtype="float16"), key)
    assert re.search(HALF[key], text)


@pytest.mark.parametrize("key", ["neon", pytest.param("sse", marks=pytest.mark.slow)])
def test_every_kernel_compiles(key):
    target = tvm.target.Target(TARGETS[key])
    config = KVCacheConfig(layers(1, 4, 2, 64, plain(64), (64,)))
    functions = {n: f.with_attr("global_symbol", n) for n, f in kernels(config, target).items()}
    text = tvm.compile(tvm.IRModule(functions), target, tir_pipeline=PIPELINE).mod.inspect_source(
        "asm"
    )
    assert all(f"{name}_compute_" in text or name in text for name in functions)
