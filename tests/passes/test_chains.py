"""Chains of linears in Relax functions: which are found, and that they change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from amx_tvm.compiler.weights import Materializer, parameters
from amx_tvm.runtime.model import FEW
from relax_passes import pipeline
from relax_passes import recipes as plans
from relax_passes.activation import INT8
from relax_passes.chosen import chosen_kernels
from relax_passes.kernels.chain import MOST_ROWS
from relax_passes.passes import bundle_parameters, legalize
from relax_passes.passes.chains import find_chains
from relax_passes.rewriting import ROWS

from .modules import Policy, Weights

WIDTH, INNER, BLOCKS = 64, 96, 2
TARGET = tvm.target.Target({"kind": "llvm", "num-cores": 2})
SHAPES = {"a": (WIDTH, WIDTH), "gate": (INNER, WIDTH), "up": (INNER, WIDTH), "b": (WIDTH, INNER)}


def network(rows, *, early=False, blocks=BLOCKS):
    """Blocks of tanh, a linear, a norm, a gated MLP; residuals as in a decoder.

    ``early`` reads the residual stream in the middle of each block.
    """
    builder = relax.BlockBuilder()
    for name, m in rows.items():
        few = {1: {ROWS: 1}, "few": {ROWS: MOST_ROWS}}.get(m, {})
        m = tirx.Var(m, "int64") if isinstance(m, str) else m
        x = relax.Var("x", relax.TensorType((m, WIDTH), "float32"))
        weights = {
            f"{i}.{n}": relax.Var(f"{i}.{n}", relax.TensorType(s, "float32"))
            for i in range(blocks)
            for n, s in SHAPES.items()
        }
        norm = relax.Var("norm", relax.TensorType((WIDTH,), "float32"))

        def matmul(h, w):
            return builder.emit(relax.op.matmul(h, builder.emit(relax.op.permute_dims(w))))

        with builder.function(name, [x, *weights.values(), norm], attrs={"num_input": 1, **few}):
            with builder.dataflow():
                stream = x
                for i in range(blocks):
                    w = {n: weights[f"{i}.{n}"] for n in SHAPES}
                    h = matmul(builder.emit(relax.op.tanh(stream)), w["a"])
                    stream = builder.emit(relax.op.add(stream, h))
                    h = builder.emit(relax.op.nn.rms_norm(stream, norm, axes=[-1], epsilon=1e-5))
                    seen = builder.emit(relax.op.exp(stream)) if early else None
                    g = builder.emit(relax.op.nn.silu(matmul(h, w["gate"])))
                    h = builder.emit(relax.op.multiply(g, matmul(h, w["up"])))
                    stream = builder.emit(relax.op.add(stream, matmul(h, w["b"])))
                    if seen is not None:
                        stream = builder.emit(relax.op.add(stream, seen))
                out = builder.emit_output(stream)
            builder.emit_func_output(out)
    return builder.get()


def quantized(module):
    """Run the phases in front of legalization."""
    for name, passes in pipeline.phases(TARGET, Policy("amxfp4", INT8), "tile16x32"):
        if name == "legalize":
            return module
        for one in passes:
            module = one(module)
    raise AssertionError("no phase legalizes")


def chains_of(module, name="forward_one"):
    return find_chains(quantized(module)[name], lambda linear: True)


def test_a_block_is_a_chain():
    found = chains_of(network({"forward_one": 1}))
    assert [len(c.linears) for c in found] == [3, 3]
    assert [c.residuals for c in found] == [(None, None, 0)] * 2
    assert [c.kept for c in found] == [(False, False, True)] * 2
    assert found[0].signature == found[1].signature
    assert len(found[0].inside) == 5


def test_what_occurs_once_is_left():
    assert chains_of(network({"forward_one": 1}, blocks=1)) == []


def test_a_reader_in_the_middle_must_not_wait_for_the_chain():
    found = chains_of(network({"forward_one": 1}, early=True))
    assert [len(c.linears) for c in found] == [2, 2]  # gate and up, then down: behind the reader
    assert [c.residuals for c in found] == [(None, None)] * 2
    assert [c.kept for c in found] == [(False, True)] * 2


def test_the_runtime_knows_how_many_rows_are_few():
    assert FEW == MOST_ROWS


def test_only_functions_of_a_few_rows_have_chains():
    module = pipeline.run(
        network({"forward_one": 1, "forward_some": "few", "forward": "m"}),
        TARGET,
        Policy("amxfp4", INT8),
        "tile16x32",
    )
    names = {name: _calls(module[name]) for name in ("forward_one", "forward_some", "forward")}
    assert names["forward_one"] == names["forward_some"] == BLOCKS and names["forward"] == 0
    kernels = chosen_kernels(legalize.kernels_of(module))
    assert {str(k.spec.rows) for k in kernels if k.chain} == {"M = 1", f"M <= {MOST_ROWS}"}


def _calls(function):
    return function.script().count("call_tir(chain")


@pytest.mark.parametrize("early", [False, True])
def test_chains_compute_the_same(early):
    rng = np.random.default_rng(0)
    module = network({"forward_one": 1, "forward_some": "few", "forward": "m"}, early=early)
    arrays = {
        f"{i}.{n}": rng.standard_normal(s).astype(np.float32) / 8
        for i in range(BLOCKS)
        for n, s in SHAPES.items()
    }
    arrays["norm"] = rng.standard_normal(WIDTH).astype(np.float32)
    module = pipeline.run(module, TARGET, Policy("amxfp4", INT8), "tile16x32")
    order = bundle_parameters.order_of(module)
    made = dict(parameters(order, plans.read(module), Materializer(Weights(arrays))))
    weights = tuple(tvm.runtime.tensor(made[n]) for n in order)
    vm = relax.VirtualMachine(pipeline.build(module, TARGET), tvm.cpu())
    for name, m in (("forward_one", 1), ("forward_some", 3), ("forward_some", MOST_ROWS)):
        x = tvm.runtime.tensor(rng.standard_normal((m, WIDTH)).astype(np.float32))
        want = vm["forward"](x, weights).numpy()
        np.testing.assert_allclose(vm[name](x, weights).numpy(), want, rtol=1e-6, atol=1e-6)
