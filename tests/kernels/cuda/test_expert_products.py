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
from amx_tvm.formats import cuda_layout, packing  # noqa: E402
from amx_tvm.formats.data import Quantized  # noqa: E402
from amx_tvm.targets.cuda.gpus import gpu  # noqa: E402
from relax_passes.activation import FLOAT16  # noqa: E402
from relax_passes.kernels.cuda.linear import function  # noqa: E402
from relax_passes.spec import LinearSpec  # noqa: E402

E, K = 4, 320  # columns of an odd number of units
GATED = {"n": 64, "bias": True, "silu_mul": True}
CLAMP = {"gate_alpha": 1.702, "gate_limit": 7.0}
CLAMPED = {**GATED, **CLAMP}
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
  for (int y = 0; y < {grid.get("blockIdx.y", 1)}; ++y)
    for (int x = 0; x < {grid["blockIdx.x"]}; ++x) {{
      blockIdx = {{x, y, 0}};
      run_team(1, {32 * grid["threadIdx.y"]}, [=](int) {{ {head[1]}({given}); }});
    }}
}}
"""
    header = f'#include "{Path(__file__).parent}/tensor_cores.h"\n'
    library = on_cpu(header + text, run, folder)
    return lambda arrays: library.run(*pointers(*(arrays[n.removesuffix("_ptr")] for n in names)))


def stack(spec: LinearSpec, rng):
    """Weights and biases of all experts: as the kernel gets them, and dense."""
    experts = max(1, spec.experts)
    rows = experts * spec.n
    order = interleaved_rows(rows, 16, experts) if spec.silu_mul else np.arange(rows)
    weight = (rng.standard_normal((rows, K)) * 0.1).astype(np.float16)
    bias = rng.standard_normal(rows).astype(np.float32)
    if spec.format == "none":
        dense, packed = weight, cuda_layout.pack_float16(weight[order])
    else:
        fmt = formats.get(spec.format)
        quantized = fmt.quantize(weight.astype(np.float32))
        dense = fmt.dequantize(quantized)
        scales = {n: s[order] for n, s in quantized.scales.items()}
        quantized = Quantized(quantized.codes[order], scales, fmt, quantized.tensor_scale)
        packed = packing.pack(spec.format, quantized, "cuda-fragment")
    arrays = {n.removeprefix("w_"): a for n, a in packed.items()} | {"bias": bias[order]}
    shape = (experts, spec.n, K)
    return arrays, dense.reshape(shape).astype(np.float64), bias.reshape(experts, -1)


def clamped(y, alpha: float = 1.702):
    """Gate rows [m, 2 N], gates first."""
    gate, up = np.split(y, 2, axis=1)
    return (np.clip(up, -7, 7) + 1) * (gate := np.minimum(gate, 7)) / (1 + np.exp(-alpha * gate))


@pytest.mark.parametrize("over_all", [True, False])
@pytest.mark.parametrize("name", ["mxfp4", "amxfp4", "none"])
def test_a_row_whose_experts_the_products_choose(name, over_all, tmp_path):
    """The first times its shares, the second their sum; units of one expert beside another's."""
    experts, chosen, rng = 70, 4, np.random.default_rng(6)
    scores = rng.standard_normal(experts).astype(np.float32)
    scores[[3, 9]] = scores[60] = 2.5  # equals: the first count
    common = {"activation": FLOAT16, "out_dtype": "float16", "experts": experts, "k": K}
    common |= {"chosen": chosen, "over_all": over_all, "bias": True, "format": name}
    first = LinearSpec(n=64, m=chosen, gathered=chosen, silu_mul=True, **CLAMP, **common)
    second = LinearSpec(n=48, m=1, joined=True, residual=True, **common)
    best = np.argsort(-scores, kind="stable")[:chosen]
    weights = np.exp(scores.astype(np.float64))
    shares = weights[best] / (weights if over_all else weights[best]).sum()

    def run(spec, given, rows):
        arrays, dense, bias = stack(spec, rng)
        y = np.full((rows, spec.out_features), np.nan, np.float16)
        func = function.build(spec, gpu("sm_90a"), dependent=True)
        folder = tmp_path / str(spec.n)
        folder.mkdir()
        kernel_on_cpu(func, folder)({**arrays, **given, "bounds": scores, "y": y})
        return y.astype(np.float64), dense[best], bias[best]

    x = rng.standard_normal((1, K)).astype(np.float16)
    y, dense, bias = run(first, {"x": x}, chosen)
    expected = shares[:, None] * clamped(np.einsum("k,jnk->jn", x[0].astype(float), dense) + bias)
    assert np.linalg.norm(y - expected) < 1e-3 * np.linalg.norm(expected)
    x = rng.standard_normal((chosen, K)).astype(np.float16)
    residual = rng.standard_normal((1, 48)).astype(np.float16)
    y, dense, bias = run(second, {"x": x, "residual": residual}, 1)
    expected = np.einsum("jk,jnk->n", x.astype(float), dense) + shares @ bias + residual[0]
    assert np.linalg.norm(y[0] - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("case,name", [*((c, "mxfp4") for c in CASES), ("few rows", "amxfp4")])
def test_products(case, name, tmp_path):
    counts, more = CASES[case]
    m = sum(counts)
    spec = LinearSpec(name, k=K, m=m, activation=FLOAT16, out_dtype="float16", experts=E, **more)
    (bucket,) = function.buckets_of(spec, gpu("sm_90a"))
    assert bucket.item == (1 if spec.listed else 4 if m <= E else 8)
    run = kernel_on_cpu(function.build(spec, gpu("sm_90a")), tmp_path)
    rng = np.random.default_rng(5)
    arrays, dense, bias = stack(spec, rng)
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
    run({**arrays, "x": x, "source": source, "bounds": bounds, "y": y})
    expected = np.einsum("mk,mnk->mn", rows.astype(np.float64), dense[expert])
    if spec.bias:
        expected = expected + bias[expert]
    if spec.gate_alpha:
        expected = clamped(expected)
    elif spec.silu_mul:
        gate, up = np.split(expected, 2, axis=1)
        expected = up * gate / (1 + np.exp(-gate))
    assert np.linalg.norm(y - expected) < 1e-3 * np.linalg.norm(expected)
