"""Products of a mixture's few rows: generated kernels, run block by block on the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from choosing import on_cpu, pointers  # noqa: E402
from cuda_compiled import cuda_text  # noqa: E402

from amx_tvm import formats  # noqa: E402
from amx_tvm.compiler.weights import interleaved_rows  # noqa: E402
from amx_tvm.formats import packing  # noqa: E402
from amx_tvm.formats.data import Quantized  # noqa: E402
from amx_tvm.targets.cuda.gpus import gpu  # noqa: E402
from relax_passes.activation import FLOAT16  # noqa: E402
from relax_passes.kernels.cuda.linear import function  # noqa: E402
from relax_passes.spec import LinearSpec  # noqa: E402

E, K = 4, 320  # columns of an odd number of units
GATED = {"n": 64, "bias": True, "silu_mul": True}
CLAMPED = {**GATED, "gate_alpha": 1.702, "gate_limit": 7.0}
# rows of each expert; what the linear is
CASES = {
    "one row, its experts listed": ([1, 0, 1, 1], {"listed": True, "gathered": 3, **CLAMPED}),
    "one row, second product": ([1, 0, 1, 1], {"listed": True, "n": 48}),
    "few rows": ([2, 0, 1, 1], {"n": 48, "bias": True}),
    "several items of an expert": ([11, 1, 0, 8], {"n": 32}),
    "gathered": ([9, 0, 2, 9], {"gathered": 2, **GATED}),
}


def kernel_on_cpu(func, folder: Path):
    """Build the only kernel of a function for the CPU; call it with arrays by name."""
    code = cuda_text({"products": func}, "sm_90a")
    text = code[code.index("#ifndef AMX_") :].replace("#include <cuda_fp16.h>", "")
    text = re.sub(r"extern __shared__ \S+ float (\w+)\[\];", r"float* \1 = shared_of(0);", text)
    head = re.search(r"(products_kernel\w*)\(([^)]*)\)\s*\{", text)
    names = [word.rsplit(" ", 1)[1] for word in head[2].split(", ")]
    sizes = re.findall(r'thread_binding\((\d+), thread="(\w+\.\w)"\)', func.script())
    grid = {place: int(size) for size, place in sizes}
    declared = ", ".join(f"void* {name}" for name in names)
    given = ", ".join(
        f"({word.rsplit(' ', 1)[0].replace('__restrict__', '')}){name}"
        for word, name in zip(head[2].split(", "), names, strict=True)
    )
    run = f"""
extern "C" void run({declared}) {{
  for (int y = 0; y < {grid["blockIdx.y"]}; ++y)
    for (int x = 0; x < {grid["blockIdx.x"]}; ++x) {{
      blockIdx = {{x, y, 0}};
      run_team(1, {32 * grid["threadIdx.y"]}, [=](int) {{ {head[1]}({given}); }});
    }}
}}
"""
    header = f'#include "{Path(__file__).parent}/tensor_cores.h"\n'
    library = on_cpu(header + text, run, folder)
    return lambda arrays: library.run(*pointers(*(arrays[n.removesuffix("_ptr")] for n in names)))


@pytest.mark.parametrize("case,name", [*((c, "mxfp4") for c in CASES), ("few rows", "amxfp4")])
def test_products(case, name, tmp_path):
    counts, more = CASES[case]
    m, fmt = sum(counts), formats.get(name)
    spec = LinearSpec(name, k=K, m=m, activation=FLOAT16, out_dtype="float16", experts=E, **more)
    (bucket,) = function.buckets_of(spec, gpu("sm_90a"))
    assert bucket.item == (1 if spec.listed else 4 if m <= E else 8)
    run = kernel_on_cpu(function.build(spec, gpu("sm_90a")), tmp_path)
    rng = np.random.default_rng(5)
    weight = (rng.standard_normal((E * spec.n, K)) * 0.1).astype(np.float32)
    quantized, bias = fmt.quantize(weight), rng.standard_normal(E * spec.n).astype(np.float32)
    dense, stored_bias = fmt.dequantize(quantized).reshape(E, spec.n, K), bias
    if spec.silu_mul:
        order = interleaved_rows(E * spec.n, 16, E)
        scales = {n: s[order] for n, s in quantized.scales.items()}
        quantized = Quantized(quantized.codes[order], scales, fmt, quantized.tensor_scale)
        stored_bias = bias[order]
    x = rng.standard_normal((m // (spec.gathered or 1), K)).astype(np.float16)
    expert = np.repeat(np.arange(E), counts).astype(np.int32)
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    source = (np.arange(m) // (spec.gathered or 1)).astype(np.int32)
    if spec.listed:
        expert = bounds = rng.permutation(expert).astype(np.int32)
    elif spec.gathered:
        source = rng.permutation(source).astype(np.int32)
    rows = x[source] if spec.gathered else x
    y = np.full((m, spec.out_features), np.nan, np.float16)
    arrays = {"x": x, "bias": stored_bias, "source": source, "bounds": bounds, "y": y}
    packed = packing.pack(name, quantized, "cuda-fragment")
    run({**arrays, **{n.removeprefix("w_"): a for n, a in packed.items()}})
    expected = np.einsum("mk,mnk->mn", rows.astype(np.float64), dense[expert].astype(np.float64))
    if spec.bias:
        expected = expected + bias.reshape(E, -1)[expert]
    if spec.silu_mul:
        gate, up = np.split(expected, 2, axis=1)
        alpha, plain = spec.gate_alpha or 1.0, not spec.gate_alpha
        gate = gate if plain else np.minimum(gate, 7)
        up = up if plain else np.clip(up, -7, 7) + 1
        expected = up * gate / (1 + np.exp(-alpha * gate))
    assert np.linalg.norm(y - expected) < 1e-3 * np.linalg.norm(expected)
