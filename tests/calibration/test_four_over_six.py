"""Four over six: the choice of scales, its kernel, and who may ask for it."""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm import formats
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import FormatError, TargetError
from amx_tvm.formats.four_over_six import four_over_six
from relax_passes.activation import Activation, four_bit
from relax_passes.tir_pipeline import PIPELINE

NAMES = ["amxfp4", "amxfp4-e4m3-tensor", "nvfp4", "mxfp4"]


def rows(shape=(24, 96), seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1]))
    x[3, :32], x[5, 32:64] = 0, np.abs(x[5, 32:64])
    return x.astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_every_scale_is_the_better_of_two(name):
    x, fmt, plain = rows(), four_over_six(formats.get(name)), formats.get(name)
    got = fmt.quantize(x, activation=True)
    rule = plain.quantize(x, activation=True)
    error = np.square(fmt.dequantize(got) - x).sum()
    assert error < 0.97 * np.square(plain.dequantize(rule) - x).sum()
    size, changed = plain.group_size, []
    for scale in plain.scale_tensors:
        before, after = (plain.decode_scale(scale.name, q.scales[scale.name]) for q in (rule, got))
        assert (after >= before).all() and (after <= 2 * before).all()
        changed.append((after > before).mean())
    assert 0.05 < np.mean(changed) < 0.95
    before, after = (
        np.square(fmt.dequantize(q) - x).reshape(len(x), -1, size).sum(-1) for q in (rule, got)
    )
    assert (after <= before * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", NAMES)
def test_kernel_equals_numpy(name):
    import tvm

    from relax_passes.kernels.cpu.activations import quantize

    x, scheme = rows(), four_bit(name, four_over_six=True)
    fmt = four_over_six(formats.get(name))
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    module = tvm.IRModule({"main": quantize(x.shape[1], None, scheme)})
    kernel = tvm.compile(module, target=target, tir_pipeline=PIPELINE)["main"]
    buffers = scheme.buffers(x.shape[1], False)
    out = {n: tvm.runtime.tensor(np.zeros((len(x), *s), d)) for n, s, d in buffers}
    kernel(tvm.runtime.tensor(x), *out.values())
    codes = [out[n].numpy().astype(np.float32) for n in out if n.startswith("codes")]
    scales = [out[n].numpy() for n in out if n.startswith("scales")]
    got = sum(c * np.repeat(s, fmt.group_size, axis=1) for c, s in zip(codes, scales, strict=True))
    want = fmt.quantize_dequantize(x, activation=True)
    same = np.isclose(got, want, rtol=1e-5, atol=1e-7)
    # Both scales may err alike; then the order of a sum decides.
    assert same.mean() > 0.99
    plain = formats.get(name).quantize_dequantize(x, activation=True)
    assert not np.isclose(plain, want, rtol=1e-5, atol=1e-7).all()


def test_who_may_ask_for_it():
    config = QuantizationConfig.parse("amxfp4-w4a4-46")
    assert config.four_over_six and config.activation == "w4a4" and config.format == "amxfp4"
    assert config.linear("model.layers.0.mlp.up_proj").activation == four_bit("amxfp4", True)
    with pytest.raises(FormatError, match="use amxfp4-w4a4-46"):
        QuantizationConfig.parse(QuantizationConfig("amxfp4", four_over_six=True))
    with pytest.raises(TargetError, match="CPUs only"):
        config.resolve("cuda")
    with pytest.raises(FormatError, match="int4 does not have"):
        assert Activation.parse("fp4:int4+46").fmt
    with pytest.raises(FormatError, match="choose one of"):
        assert Activation.parse("fp4:fp3+46").fmt
