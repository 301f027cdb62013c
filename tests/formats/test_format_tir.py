"""The TIR decode of every stored scale equals NumPy's, compiled for llvm, scalar and vector."""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm import formats
from relax_passes.tir_pipeline import PIPELINE

tvm = pytest.importorskip("tvm")
from tvm import tirx  # noqa: E402
from tvm.script import tirx as T  # noqa: E402

COUNT = 256
CASES = [(f, s.name) for f in formats.names() for s in formats.get(f).scale_tensors]


def stored_scales(fmt: formats.Format, name: str) -> np.ndarray:
    """256 legal stored scales, subnormals and the largest included."""
    kind = fmt.scale_tensor(name).type
    if kind.dtype == "float16":
        patterns = np.linspace(0, kind.largest, COUNT).astype(np.uint16)
        patterns[:8] = [0, 1, 2, 3, 0x3FF, 0x400, 0x401, kind.largest]
        return patterns.view(np.float16)
    return (np.arange(COUNT) % (kind.largest + 1)).astype(np.uint8)


def kernel(fmt: formats.Format, name: str, dtype: str, lanes: int) -> tvm.tirx.PrimFunc:
    """Decode COUNT scales, `lanes` at a time."""

    def place(i):  # a vector of one lane is an error in TVM
        return i if lanes == 1 else T.Ramp(i * lanes, 1, lanes)

    @T.prim_func(s_tir=True)
    def decode(a: T.Buffer((COUNT,), dtype), c: T.Buffer((COUNT,), "float32")):
        for i in T.serial(COUNT // lanes):
            c[place(i)] = fmt.decode_scale_tir(name, a[place(i)])

    return decode


def decode_compiled(fmt, name, stored, lanes, target):
    function = kernel(fmt, name, str(stored.dtype), lanes).with_attr("global_symbol", "main")
    built = tvm.compile(
        tvm.IRModule({"main": function}), tvm.target.Target(target), tir_pipeline=PIPELINE
    )
    out = tvm.runtime.tensor(np.zeros(COUNT, np.float32))
    built(tvm.runtime.tensor(stored), out)
    return out.numpy()


@pytest.mark.parametrize("lanes", [1, 4, 16])
@pytest.mark.parametrize("format_name, scale", CASES)
def test_compiled_decode_equals_numpy(format_name, scale, lanes):
    fmt = formats.get(format_name)
    stored = stored_scales(fmt, scale)
    found = decode_compiled(fmt, scale, stored, lanes, {"kind": "llvm"})
    expected = fmt.decode_scale(scale, stored)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("lanes", [1, 16])
def test_a_half_decodes_from_its_bits_too(lanes):
    fmt = formats.get("int8")
    stored = stored_scales(fmt, "scale")
    found = decode_compiled(fmt, "scale", stored.view(np.uint16), lanes, {"kind": "llvm"})
    np.testing.assert_array_equal(found, stored.astype(np.float32))


def test_the_decode_keeps_the_lanes():
    for lanes in ("", "x4", "x16"):
        for format_name, scale in CASES:
            fmt = formats.get(format_name)
            var = tirx.Var("stored", fmt.scale_tensor(scale).dtype + lanes)
            assert str(fmt.decode_scale_tir(scale, var).ty) == "float32" + lanes
