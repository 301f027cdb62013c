"""Chains of linears in one kernel, against their linears and quantizations one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cpu_oracle import HOST, Case, compile_func, empty, kernel_func, tensors
from tvm.target import Target

from relax_passes.activation import FLOAT32, INT8, OUTLIERS, four_bit
from relax_passes.kernels.chain import MOST_ROWS, ChainSpec, Quantization, chains
from relax_passes.kernels.cpu import activations
from relax_passes.kernels.cpu.linear import by_group
from relax_passes.kernels.registry import chain_kernel
from relax_passes.spec import LinearSpec

WIDTH, INNER = 64, 96
AVX2 = Target({"kind": "llvm", "mcpu": "x86-64-v3", "mtriple": "x86_64-linux-gnu"})


def layer(fmt="amxfp4", scheme=OUTLIERS, m=None, inner=INNER, source="float16"):
    """Output projection, gate and up, down and the next query/key/value projection."""
    most = None if m else MOST_ROWS

    def linear(n, k, **options):
        return LinearSpec(fmt, n, k, scheme, m=m, m_max=most, **options)

    stages = (
        linear(WIDTH, WIDTH, residual=True),
        linear(2 * inner, WIDTH, silu_mul=True),
        linear(WIDTH, inner, residual=True),
        linear(80, WIDTH, out_dtype="float16"),
    )
    plain, norm = Quantization(scheme), Quantization(scheme, "rms_norm", 1e-5)
    adds, kept = (None, None, 0, None), (False, False, True, True)
    return ChainSpec(stages, (plain, norm, plain, norm), source, adds, kept, m)


class LayerInputs:
    """Random weights, norms and rows of x for a chain."""

    def __init__(self, spec):
        self.spec = spec
        self.weights = [Case(s, seed=i).packed for i, s in enumerate(spec.stages)]
        self.rng = np.random.default_rng(1)
        self.norms = [self.rng.standard_normal(WIDTH).astype(np.float32) for _ in range(2)]

    def inputs(self, m):
        """Make x with some outliers, and the residual stream."""
        x = self.rng.standard_normal((m, WIDTH)).astype(self.spec.source)
        x[::2, 3] *= 40
        return x, 5 * self.rng.standard_normal((m, WIDTH)).astype(np.float32)

    def arguments(self, x, residual):
        """List what the kernel takes, but its results."""
        w, norms = self.weights, self.norms
        return [x, *w[0], residual, norms[0], *w[1], *w[2], norms[1], *w[3]]


class Layer(LayerInputs):
    """A chain: its kernel, and its linears apart."""

    def __init__(self, spec, target=HOST, knobs=None):
        super().__init__(spec)
        self.kernel = compile_func(chain_kernel(spec, target, knobs or [None] * 4).func, target)
        self.apart = [kernel_func(s, target=target) for s in spec.stages]
        self.quantize = []
        for i, (s, how) in enumerate(zip(spec.stages, spec.quantized, strict=True)):
            source = "float32" if i else spec.source
            what = (s.k, spec.m, how.scheme, s.needs_sums, how.prologue, how.eps, source)
            self.quantize.append(compile_func(activations.quantize(*what), target))

    def linear(self, i, m, x, norm=(), residual=()):
        """Quantize x and run one linear."""
        stage = self.spec.stages[i]
        parts = [empty((m, *s), d) for _, s, d in self.spec.stages[i].activation_buffers()]
        self.quantize[i](x, *norm, *parts)
        y = empty((m, stage.out_features), stage.out_dtype)
        self.apart[i](*parts, *tensors(*self.weights[i]), *residual, y)
        return y

    def want(self, m, x, residual):
        """Compute the chain linear by linear."""
        x, residual, *norms = tensors(x, residual, *self.norms)
        stream = self.linear(0, m, x, residual=[residual])
        gated = self.linear(1, m, stream, [norms[0]])
        stream = self.linear(2, m, gated, residual=[stream])
        return stream, self.linear(3, m, stream, [norms[1]])

    def got(self, m, x, residual):
        """Compute the chain with its kernel."""
        out = [empty((m, s.out_features), s.out_dtype) for _, s in self.spec.results]
        self.kernel(*tensors(*self.arguments(x, residual)), *out)
        return out

    def check(self, m):
        """Compare bit for bit."""
        case = self.inputs(m)
        for got, want in zip(self.got(m, *case), self.want(m, *case), strict=True):
            np.testing.assert_array_equal(got.numpy(), want.numpy(), err_msg=f"M={m}")


FEW = (1, 3, 8, 13, MOST_ROWS)


def test_a_few_rows():
    case = Layer(layer())
    for m in FEW:
        case.check(m)
    with pytest.raises(Exception, match=f"at most {MOST_ROWS} rows"):
        case.got(MOST_ROWS + 1, *case.inputs(MOST_ROWS + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fmt, scheme", [("amxfp4", four_bit("amxfp4")), ("int4", OUTLIERS), ("mxfp4", INT8)]
)
def test_other_formats(fmt, scheme):
    case = Layer(layer(fmt, scheme))
    for m in FEW:
        case.check(m)


def test_one_row():
    Layer(layer(m=1, source="float32")).check(1)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [OUTLIERS, replace(four_bit("amxfp4"), outliers=True)], ids=str)
def test_other_instructions(scheme):
    case = Layer(layer(scheme=scheme), AVX2)
    for m in (1, 5, 8):
        case.check(m)


@pytest.mark.slow
def test_ragged_groups_are_quantized_row_by_row():
    Layer(layer(inner=80)).check(8)


def test_which_results_are_quantized_by_groups():
    spec, ragged = layer(), layer(inner=80)
    assert by_group.supports(spec.stages[1], spec.quantized[2])
    assert not by_group.supports(ragged.stages[1], ragged.quantized[2])
    assert not by_group.supports(spec.stages[0], spec.quantized[1])


def test_which_linears():
    spec = LinearSpec("amxfp4", 64, 64, OUTLIERS)
    assert chains(spec)
    for other in (
        replace(spec, format="none"),
        replace(spec, activation=FLOAT32),
        replace(spec, experts=4),
    ):
        assert not chains(other)
