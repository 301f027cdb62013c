"""Lowering of loops: what is left out changes no kernel, and scheduled functions get all of it."""

from __future__ import annotations

import pytest
import tvm
from tvm import s_tir, te, tirx
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm_ffi import structural_equal

from relax_passes.activation import FLOAT32
from relax_passes.kernels.registry import linear_kernel
from relax_passes.spec import LinearSpec
from relax_passes.tir_pipeline import PIPELINE, SKIPPED

TARGET = tvm.target.Target(
    {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3", "num-cores": 2}
)


def kernel():
    """Return a linear's kernel, which has no buffers of its own."""
    with TARGET:
        return linear_kernel(LinearSpec("amxfp4", 64, 64, FLOAT32, m=1), TARGET).func


def scheduled():
    """Return a function of two blocks, the first one's rows made where the second needs them."""
    x = te.placeholder((64, 64), name="x")
    half = te.compute((64, 64), lambda i, j: x[i, j] * 0.5, name="half")
    out = te.compute((64, 64), lambda i, j: half[i, j] + 1.0, name="out")
    schedule = s_tir.Schedule(te.create_prim_func([x, out]))
    block = schedule.get_sblock("out")
    schedule.compute_at(schedule.get_sblock("half"), schedule.get_loops(block)[0])
    return schedule.mod["main"]


def lowered(factory, function):
    module = tvm.IRModule({"f": function.with_attr("global_symbol", "f")})
    passes, *_ = factory()
    return passes(tirx.transform.BindTarget(TARGET.with_host(TARGET))(module))


@pytest.mark.parametrize("make", [kernel, scheduled])
def test_lowered_loops_are_those_of_all_passes(make):
    function = make()
    ours = lowered(lambda: tirx.get_tir_pipeline(PIPELINE), function)
    stock = lowered(default_s_tir_pipeline, function)
    tvm.ir.assert_structural_equal(ours, stock)
    with tvm.transform.PassContext(disabled_pass=SKIPPED):
        without = lowered(default_s_tir_pipeline, function)
    assert structural_equal(without, stock) == (make is kernel)
