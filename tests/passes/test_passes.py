"""Every pass on small Relax modules, none a language model: what it finds and what it leaves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tvm

from amx_tvm import formats
from amx_tvm.artifact.manifest import TensorRecord
from amx_tvm.compiler.weights import Materializer, bits_by_format, interleaved_rows, parameters
from relax_passes import pipeline
from relax_passes import recipes as plans
from relax_passes.activation import INT8
from relax_passes.ops import Linear, is_op
from relax_passes.passes import bundle_parameters, legalize
from relax_passes.passes.annotate_linears import annotate_linears
from relax_passes.passes.fuse_epilogue import fuse_bias, fuse_residual_and_gate
from relax_passes.passes.merge_projections import merge_projections
from relax_passes.policy import LinearPolicy

from .modules import Gated, Planned, Policy, Ragged, Weights


def linears(module):
    found = []
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            if is_op(binding.value, "amx.linear"):
                found.append(Linear.of(binding.value))
    return found


def apply(module, *passes):
    for one in passes:
        module = one(module)
    return module


def test_annotation_finds_both_orientations():
    module = apply(Gated, annotate_linears(Policy()))
    found = linears(module)
    assert [(f.attrs.name, f.attrs.n, f.attrs.k) for f in found] == [
        ("gate", 96, 64),
        ("up", 96, 64),
        ("down", 64, 96),
    ]
    assert plans.read(module)["down.T"].transpose


def test_bias_is_folded_only_where_nothing_else_reads_the_product():
    module = apply(Gated, annotate_linears(Policy()), fuse_bias())
    assert [f.bias is not None for f in linears(module)] == [False, False, True]


def test_merged_gate_and_up_take_their_product_and_the_residual_along():
    passes = (fuse_bias(), merge_projections, fuse_residual_and_gate(tvm.target.Target("llvm")))
    module = apply(Gated, annotate_linears(Policy()), *passes)
    gate_up, down = linears(module)
    assert gate_up.attrs.silu_mul and gate_up.attrs.n == 192
    assert down.residual is not None and down.bias is not None
    recipe = plans.read(module)[gate_up.weights[0].name]
    assert recipe.sources == ("gate", "up") and recipe.interleave == 16


def test_linears_of_different_formats_do_not_merge():
    class Mixed(Policy):
        def linear(self, name):
            return LinearPolicy("nvfp4" if name == "up" else "amxfp4")

    module = apply(Gated, annotate_linears(Mixed()), merge_projections)
    assert [f.attrs.n for f in linears(module)] == [96, 96, 64]


def test_stored_bits_count_every_part_of_a_format_once():
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    module = pipeline.run(Gated, target, Policy("nvfp4"), "tile16x32")
    arrays = {name: np.ones((96, 64), np.float32) for name in ("gate", "up", "down")}
    arrays["bias"] = np.ones(64, np.float32)
    made = parameters(
        bundle_parameters.order_of(module), plans.read(module), Materializer(Weights(arrays))
    )
    stored = {name: TensorRecord(list(a.shape), str(a.dtype), 0, 0, a.nbytes) for name, a in made}
    bits = bits_by_format(plans.read(module), lambda name: arrays[name].shape, stored)
    # gate and up: 12 tiles of 16 x 64; down, 64 x 96: 4 tiles; one float32 each
    assert bits == {"nvfp4": 4.5 + 32 * (12 + 4) / (3 * 96 * 64)}


@pytest.mark.parametrize("fmt, merged", [("amxfp4", True), ("nvfp4", False), ("none", True)])
def test_two_tensor_scales_never_share_a_tile(fmt, merged):
    rows = (24, 40)
    module = apply(Ragged, annotate_linears(Policy(fmt)), merge_projections)
    assert [f.attrs.n for f in linears(module)] == ([sum(rows)] if merged else list(rows))
    rng = np.random.default_rng(4)
    arrays = {
        "a": rng.standard_normal((rows[0], 64), np.float32),
        "b": 50 * rng.standard_normal((rows[1], 64), np.float32),
    }
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    module = pipeline.run(Ragged, target, Policy(fmt), "tile16x32")
    order = bundle_parameters.order_of(module)
    made = dict(parameters(order, plans.read(module), Materializer(Weights(arrays))))
    vm = tvm.relax.VirtualMachine(pipeline.build(module, target), tvm.cpu())
    x = rng.standard_normal((3, 64), np.float32)
    got = vm["main"](tvm.runtime.tensor(x), tuple(tvm.runtime.tensor(made[n]) for n in order))
    for name, part in zip("ab", np.split(got.numpy(), [rows[0]], axis=1), strict=True):
        w = arrays[name] if fmt == "none" else formats.quantize_dequantize(fmt, arrays[name])
        expected = x.astype(np.float64) @ w.T
        assert np.linalg.norm(part - expected) < 1e-5 * np.linalg.norm(expected)


def test_printed_ir_names_each_linear():
    text = apply(Gated, annotate_linears(Policy("mxfp4", INT8))).script()
    assert text.count('"amx.linear"') == 3
    assert '"format": "mxfp4"' in text and '"activation": "int8"' in text


def test_interleaved_rows_alternate_tiles_of_the_halves():
    assert interleaved_rows(8, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("fmt", ["amxfp4", "mxfp4", "nvfp4", "int4", "none"])
@pytest.mark.parametrize("m", [1, 5])
def test_the_whole_pipeline_equals_numpy(fmt, m):
    rng = np.random.default_rng(3)
    arrays = {
        "gate": rng.standard_normal((96, 64), np.float32),
        "up": rng.standard_normal((96, 64), np.float32),
        "down": rng.standard_normal((96, 64), np.float32),
        "bias": rng.standard_normal(64).astype(np.float32),
    }
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    module = pipeline.run(Gated, target, Policy(fmt), "tile16x32")
    order = bundle_parameters.order_of(module)
    made = dict(parameters(order, plans.read(module), Materializer(Weights(arrays))))
    vm = tvm.relax.VirtualMachine(pipeline.build(module, target), tvm.cpu())
    x = rng.standard_normal((m, 64), np.float32)
    weights = [tvm.runtime.tensor(made[name]) for name in order]
    got = vm["main"](tvm.runtime.tensor(x), tuple(weights)).numpy()

    def rounded(w):
        if fmt == "none":
            return w.astype(np.float64)
        return formats.quantize_dequantize(fmt, w).astype(np.float64)

    g, u = x @ rounded(arrays["gate"]).T, x @ rounded(arrays["up"]).T
    h = g / (1 + np.exp(-g)) * u
    down = np.ascontiguousarray(arrays["down"].T)
    expected = x + h @ rounded(down).T + arrays["bias"]
    assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)
    kernels = legalize.kernels_of(module)
    assert {k["name"] for k in kernels} == {"gate+up", "down"}
    assert all(k["kernel"] and k["why"] for k in kernels)
    json.dumps(kernels)


def test_dump_writes_every_phase(tmp_path):
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    pipeline.run(Gated, target, Policy(), "tile16x32", dump=pipeline.dump_to(tmp_path))
    names = [p.name for p in sorted(tmp_path.iterdir())]
    expected = ["input", "find", "merge", "quantize", "legalize", "lower", "bundle"]
    assert names == [f"{i:02d}-{name}.py" for i, name in enumerate(expected)]
    assert "amx.linear" in (tmp_path / "03-quantize.py").read_text()
    assert "amx.linear" not in (tmp_path / "04-legalize.py").read_text()


def test_layers_that_share_tensors_compute_what_they_say():
    """Storages in turns, of two shapes; for several numbers of rows, as views depend on them."""
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    module = bundle_parameters.bundle_parameters(Planned)
    vm = tvm.relax.VirtualMachine(pipeline.build(module, target), tvm.cpu())
    rng = np.random.default_rng(5)
    w = (1 + rng.random(64)).astype(np.float32)
    for rows in (1, 7, 3):
        x = rng.standard_normal((rows, 64)).astype(np.float32)
        got = vm["main"](tvm.runtime.tensor(x), (tvm.runtime.tensor(w),)).numpy()
        np.testing.assert_allclose(got, 4 * x * w**5, rtol=1e-5)
