"""W4A8: what the name means for a target, which linears are E4M3, and what they read."""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import FormatError, TargetError
from amx_tvm.formats import e4m3
from amx_tvm.targets import resolve
from relax_passes.activation import E4M3, E4M3_ROWS, FLOAT16, INT8
from relax_passes.kernels.registry import linear_kernel
from relax_passes.ops import Linear, is_op, quantize_attrs
from relax_passes.passes.annotate_linears import annotate_linears
from relax_passes.passes.legalize import legalize
from relax_passes.passes.merge_projections import merge_projections
from relax_passes.passes.quantize_activations import quantize_activations
from relax_passes.passes.quantize_parameters import quantize_parameters
from relax_passes.spec import LinearSpec

from .modules import decoder

CUDA = resolve("cuda:sm_90a").tvm


def test_name():
    config = QuantizationConfig.parse("nvfp4-w4a8")
    assert (config.format, config.activation) == ("nvfp4", "w4a8")
    assert config.resolve("cpu").linear("a").activation == INT8
    on_gpu = config.resolve("cuda", ("sm_90a",))
    assert on_gpu.linear("a").activation == E4M3
    assert on_gpu.linear("lm_head").activation == FLOAT16
    with pytest.raises(FormatError, match="strict mode"):
        QuantizationConfig.parse("amxfp4-w4a8", strict=True)


@pytest.mark.parametrize(
    "arch,match", [("sm_80", "does not multiply FP8"), ("sm_89", "has no kernels for it yet")]
)
def test_other_gpus_are_refused(arch, match):
    config = QuantizationConfig.parse("amxfp4-w4a8")
    with pytest.raises(TargetError, match=f"{arch} {match}.*sm_90a"):
        config.resolve("cuda", ("sm_90a", arch))


def lowered(name: str):
    config = QuantizationConfig.parse(name).resolve("cuda", ("sm_90a",))
    module = decoder()
    for one in (
        annotate_linears(config),
        merge_projections,
        quantize_parameters(config, "cuda-fragment"),
        quantize_activations(CUDA),
    ):
        module = one(module)
    return module


def found(module, op: str):
    functions = [f for f in module.functions.values() if hasattr(f, "body")]
    blocks = (b for f in functions for b in getattr(f.body, "blocks", ()))
    return [b.value for block in blocks for b in block.bindings if is_op(b.value, op)]


def test_linears_read_x_and_its_bytes():
    module = lowered("amxfp4-w4a8")
    linears = [Linear.of(call) for call in found(module, "amx.linear")]
    rounded = [one for one in linears if one.attrs.activation == E4M3]
    assert {one.attrs.layout for one in rounded} == {e4m3.LAYOUT}
    for one in rounded:
        assert [str(x.ty.dtype) for x in one.x] == ["float16", "uint8", "float32"]
        assert one.weights[-1].name.endswith(".table")
    # the head has 8.5 bits, and one rounding serves q, k and v
    assert any(one.attrs.activation == FLOAT16 for one in linears)
    calls = found(module, "amx.quantize_activation")
    assert len(calls) == len(rounded)
    assert {quantize_attrs(call).prologue for call in calls} == {"none"}


def test_other_formats_keep_16_bits():
    linears = [Linear.of(call) for call in found(lowered("int4-w4a8"), "amx.linear")]
    assert {one.attrs.activation for one in linears} == {FLOAT16}
    assert not any(one.attrs.layout == e4m3.LAYOUT for one in linears)


def test_modules_are_lowered():
    module = legalize(CUDA)(lowered("amxfp4-w4a8"))
    names = [v.name_hint for v in module.get_global_vars()]
    assert any("quantize_e4m3" in name for name in names)
    assert any("linear_amxfp4_e4m3" in name for name in names)


def test_rows_of_16_bits_and_of_e4m3():
    spec = LinearSpec("amxfp4", 512, 512, E4M3, out_dtype="float16")
    rows = {r.first: r.kernel for r in linear_kernel(spec, CUDA).rows}
    assert rows[E4M3_ROWS] == "tile-e4m3" and rows[1] == "gemv"


def test_numbers_of_many_rows_differ_from_the_format_s():
    """What the oracle says of W, so that nobody takes one for the other."""
    from amx_tvm import formats

    weight = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    quantized = formats.get("amxfp4").quantize(weight)
    exact, got = quantized.format.dequantize(quantized), e4m3.decoded(quantized)
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.03
