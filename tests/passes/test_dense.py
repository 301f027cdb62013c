"""Attention of functions for CUDA: what a kernel reads of a bias."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("tvm")

from tvm import relax, tirx  # noqa: E402
from tvm.ir import IRModule  # noqa: E402

from amx_tvm.targets import resolve  # noqa: E402
from relax_passes.passes.lower_dense import lower_dense  # noqa: E402

CUDA = resolve("cuda:sm_90a").tvm
HEADS, ROWS, EXAMPLES = 3, 16, 2


def attending(*bias: int) -> IRModule:
    """A function that attends with a bias of a shape [example, head, query, key]."""
    shape = (EXAMPLES, ROWS, HEADS, 16)
    q, k, v = (relax.Var(n, relax.TensorType(shape, "float16")) for n in "qkv")
    added = relax.Var("bias", relax.TensorType(bias, "float16"))
    builder = relax.BlockBuilder()
    with builder.function("main", [q, k, v, added], attrs={"num_input": 4}):
        with builder.dataflow():
            out = builder.emit_output(relax.op.nn.attention(q, k, v, added))
        builder.emit_func_output(out)
    return builder.finalize()


def read_by(module: IRModule) -> set[str]:
    """The block's indices that where the bias begins depends on."""
    (kernel,) = (f for f in module.functions.values() if isinstance(f, tirx.PrimFunc))
    text = kernel.script()
    threads = dict(re.findall(r"for (\w+) in T\.thread_binding\([^\n]*thread=\"([\w.]+)\"", text))
    (place,) = re.findall(r"T\.address_of\(bias\[(.*?)\]\)", text)
    return {threads[name] for name in re.findall(r"\w+", place) if name in threads}


@pytest.mark.parametrize(
    "bias,indices",
    [
        ((EXAMPLES, HEADS, ROWS, ROWS), {"blockIdx.y", "blockIdx.z"}),
        ((EXAMPLES, 1, ROWS, ROWS), {"blockIdx.z"}),
        ((1, HEADS, ROWS, ROWS), {"blockIdx.y"}),
        ((1, 1, ROWS, ROWS), set()),
    ],
)
def test_an_axis_of_one_is_the_same_for_all(bias, indices):
    assert read_by(lower_dense(CUDA)(attending(*bias))) == indices
