"""The vector functions against NumPy float64, on targets with and without FMA."""

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from amx_tvm.targets import host_options
from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.attention import functions
from relax_passes.kernels.cpu.attention import vector as v
from relax_passes.tir_pipeline import PIPELINE

CPUS = [host_options()["mcpu"], "x86-64"]


def apply(function, x, cpu=CPUS[0]):
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name("f")
            handles = [T.arg(name, T.handle()) for name in ("x", "y")]
            n = T.int32()
            source, result = (T.match_buffer(h, (n,), "float32") for h in handles)
            with T.serial(0, v.div(n, v.LANES)) as i:
                v.store(result, function(e.let(v.load(source, [i * v.LANES]))), [i * v.LANES])
        module = tvm.IRModule({"f": builder.get()})
    y = tvm.runtime.tensor(np.zeros_like(x))
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu})
    tvm.compile(module, target, tir_pipeline=PIPELINE)["f"](tvm.runtime.tensor(x), y)
    return y.numpy()


@pytest.mark.parametrize("cpu", CPUS)
def test_exp2(cpu):
    x = np.linspace(-126, 20, 1 << 18).astype(np.float32)
    assert np.abs(apply(functions.exp2, x, cpu) / np.exp2(x.astype(np.float64)) - 1).max() < 3e-7


def test_exp2_of_masked_scores_is_zero():
    x = np.array([v.NEG_INF, -5e4, -1000, -127] * 4, np.float32)
    assert (apply(functions.exp2, x) == 0).all()


@pytest.mark.parametrize("cpu", CPUS)
def test_log2(cpu):
    x = np.exp(np.random.default_rng(0).normal(0, 10, 1 << 16)).astype(np.float32)
    expected = np.log2(x.astype(np.float64))
    error = np.abs(apply(functions.log2, x, cpu) - expected) / np.maximum(1, np.abs(expected))
    assert error.max() < 2e-7


@pytest.mark.parametrize("cpu", CPUS)
def test_soft_cap(cpu):
    x = np.random.default_rng(0).normal(0, 60, 1 << 16).astype(np.float32)
    expected = 50 * np.tanh(x * np.log(2) / 50) / np.log(2)
    error = np.abs(apply(lambda a: functions.soft_cap(a, 50.0), x, cpu) - expected)
    assert (error / np.maximum(1, np.abs(expected))).max() < 5e-7
    assert apply(lambda a: functions.soft_cap(a, 0.0), x, cpu).tobytes() == x.tobytes()


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("which", [0, 1])
def test_sincos_up_to_long_contexts(cpu, which):
    rng = np.random.default_rng(which)
    x = np.concatenate(
        [rng.uniform(0, 131072, 1 << 16), np.arange(1 << 12) * (np.pi / 2), np.arange(16)]
    ).astype(np.float32)
    got = apply(lambda a: functions.sincos(a)[which], x, cpu)
    expected = (np.sin, np.cos)[which](x.astype(np.float64))
    assert np.abs(got - expected).max() < 4e-8  # half a unit in the last place of 1


def test_reductions_reach_every_lane():
    x = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    assert (apply(lambda a: v.reduce_lanes(a, tirx.max), x) == x.max()).all()
    total = apply(lambda a: v.reduce_lanes(a, lambda p, q: p + q), x)
    np.testing.assert_allclose(total, x.sum(), atol=1e-5)


def test_register_files():
    of = v.VectorTarget.of
    assert of({"kind": "llvm", "mcpu": "znver4"}) == v.VectorTarget(16, 32)
    assert of({"kind": "llvm", "mcpu": "haswell"}) == v.VectorTarget(8, 16)
    assert of({"kind": "llvm", "mcpu": "x86-64"}) == v.VectorTarget(4, 16)
    neon = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}
    assert of(neon) == v.VectorTarget(4, 32)
