"""Rows of packed tables: what the format's NumPy code says, bit for bit, on a CPU's loops."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_compiled import compile_functions, needs_nvcc

from amx_tvm import formats
from amx_tvm.formats import cuda_layout
from relax_passes.kernels.cuda.rows.embedding import embedding
from relax_passes.tir_pipeline import PIPELINE


# Tiles and blocks of threads that are partly filled; a row shorter than a block once.
@pytest.mark.parametrize(
    "name,rows,k", [*((n, 70, 576) for n in formats.names()), ("int4", 33, 96)]
)
def test_rows_of_a_table(name, rows, k):
    import tvm

    fmt = formats.get(name)
    table = np.random.default_rng(0).standard_normal((rows, k)).astype(np.float32)
    quantized = fmt.quantize(table)
    function = embedding(rows, k, name, None, bound=False).with_attr("global_symbol", "f")
    lookup = tvm.compile(tvm.IRModule({"f": function}), "llvm", tir_pipeline=PIPELINE)["f"]
    ids = np.array([0, rows - 1, 7, 8, 15, 16, 31, -1, rows], np.int32)  # the last two: outside
    y = tvm.runtime.tensor(np.full((len(ids), k), np.nan, np.float16))
    parts = [tvm.runtime.tensor(a) for a in cuda_layout.pack(fmt, quantized).values()]
    lookup(tvm.runtime.tensor(ids), *parts, y)
    ids[-2:] = 0
    expected = fmt.dequantize(quantized).astype(np.float16)[ids]
    np.testing.assert_array_equal(y.numpy(), expected)


@needs_nvcc
def test_compiles_for_a_gpu():
    made = compile_functions({"f": embedding(64, 96, "int8", None)}, "sm_80")
    assert "blockIdx.x" in made.code and made.cubin
