"""torch modules: exported, compiled, quantized, against the same module with rounded weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import amx_tvm
from amx_tvm import formats
from amx_tvm.calibration import calibrate_module
from amx_tvm.compiler.lowered import lower_source
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import CalibrationError, ModelError
from amx_tvm.frontends import open_model
from amx_tvm.targets import resolve
from tests.models import tiny

from .conftest import one_line


class Block(nn.Module):
    """A pre-norm transformer block with torch's own attention function."""

    def __init__(self, width=64, heads=4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        b, s, w = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, s, 3, self.heads, w // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, w))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class ConvNet(nn.Module):
    """Convolutions stay in float32; the classifier is a linear."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(8 * 8 * 8, 10)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def mlp():
    return nn.Sequential(nn.Linear(48, 96), nn.SiLU(), nn.Linear(96, 20, bias=False))


def vit():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
    )
    model = ViTModel(config, add_pooling_layer=False)

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).last_hidden_state

    return Features()


CASES = {
    "mlp": (mlp, (5, 48)),
    "block": (Block, (2, 7, 64)),
    "convolutions": (ConvNet, (2, 3, 16, 16)),
    "vit": (vit, (2, 3, 32, 32)),
}


def rounded(module, name="amxfp4"):
    """Round the weights of all linears in place."""
    fmt = formats.get(name)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear):
                values = fmt.dequantize(fmt.quantize(part.weight.numpy().copy()))
                part.weight.copy_(torch.from_numpy(values))
    return module


@pytest.mark.parametrize("name", sorted(CASES))
def test_equals_rounded_torch(name, tmp_path):
    torch.manual_seed(0)
    build, shape = CASES[name]
    module, x = build().eval(), torch.randn(shape)
    dynamic = ({0: torch.export.Dim("batch")},)
    artifact = amx_tvm.compile(
        module,
        example_inputs=(x,),
        dynamic_shapes=dynamic,
        strict=True,
        output=tmp_path / "out",
    )
    quantized = {entry["name"]: entry["spec"]["format"] for entry in artifact.manifest.linears}
    assert set(quantized.values()) == {"amxfp4"}
    engine = amx_tvm.load(artifact.path)
    rounded(module)
    for batch in (shape[0], 3):
        x = torch.randn(batch, *shape[1:])
        with torch.no_grad():
            expected = module(x).numpy()
        assert tiny.relative_error(np.asarray(engine(x)), expected) < 1e-3


@pytest.mark.parametrize("name", ["block", "vit"])
def test_a_gpu_attends_in_one_kernel_that_reads_the_projections(name):
    build, shape = CASES[name]
    dynamic = ({0: torch.export.Dim("batch")},)
    source = open_model(build().eval(), (torch.randn(shape),), dynamic)
    config = QuantizationConfig().resolve("cuda")
    lowered = lower_source(source, resolve("cuda:sm_90a"), config)
    kernels = {gvar.name_hint for gvar in lowered.module.get_global_vars()}
    assert "attention" in kernels
    assert not [k for k in kernels if "softmax" in k or "split" in k]
    main = lowered.module["main"]
    assert main.params[0].ty.dtype == main.ret_ty.dtype == "float32"


def test_masks_of_booleans_are_added(tmp_path):
    class Masked(nn.Module):
        def forward(self, x, mask):
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x, mask = torch.randn(1, 2, 5, 8), torch.ones(5, 5).tril().bool()
    options = {"example_inputs": (x, mask), "quantization": "none", "output": tmp_path / "out"}
    engine = amx_tvm.load(amx_tvm.compile(Masked().eval(), **options).path)
    expected = Masked()(x, mask).numpy()
    np.testing.assert_allclose(np.asarray(engine(x, mask)), expected, atol=1e-5)


class Turned(nn.Module):
    """Nothing but another shape."""

    def forward(self, x):
        return x.reshape(4, 2)


def test_a_function_without_kernels(tmp_path):
    x = torch.randn(2, 4)
    amx_tvm.compile(Turned().eval(), output=tmp_path / "out", example_inputs=(x,))
    np.testing.assert_array_equal(amx_tvm.load(tmp_path / "out")(x.numpy()), x.reshape(4, 2))


def test_llama_object_gets_the_kv_cache(tmp_path):
    model = tiny.make("llama")
    artifact = amx_tvm.compile(model, quantization="none", output=tmp_path / "out")
    assert artifact.manifest.kind == "causal_lm"
    ids = list(range(3, 20))
    got = np.asarray(amx_tvm.load(artifact.path).logits(ids))
    assert tiny.relative_error(got, tiny.logits(model, ids)) < 1e-4


class Sorting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"odd": Odd()})

    def forward(self, x):
        return self.inner["odd"](x)


class Odd(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_unsupported_operator_names_layer_and_line(tmp_path):
    with pytest.raises(ModelError) as raised:
        amx_tvm.compile(Sorting().eval(), example_inputs=(torch.rand(4),), output=tmp_path / "out")
    message = one_line(raised.value)
    assert "bessel_j0" in message and "inner.odd" in message and "test_torch_module.py" in message


def test_errors_name_what_is_missing(tmp_path):
    with pytest.raises(ModelError, match="example_inputs"):
        amx_tvm.compile(mlp().eval(), output=tmp_path / "out")
    with pytest.raises(ModelError, match="eval"):
        amx_tvm.compile(mlp().train(), example_inputs=(torch.rand(1, 48),), output=tmp_path / "out")
    half = mlp().eval().half()
    with pytest.raises(ModelError, match="float32"):
        amx_tvm.compile(half, example_inputs=(torch.rand(1, 48).half(),), output=tmp_path / "out")


def test_calibrated_weights_are_compiled(tmp_path):
    torch.manual_seed(0)
    module, batches = mlp().eval(), [(torch.randn(64, 48),)]
    made = calibrate_module(module, batches)
    artifact = amx_tvm.compile(
        module,
        example_inputs=(torch.randn(5, 48),),
        calibration=batches,
        strict=True,
        output=tmp_path / "out",
    )
    assert artifact.manifest.quantization["recipe"]["name"] == "gptq"
    x = torch.randn(5, 48)
    with torch.no_grad():
        for name, quantized in made.quantized.items():
            values = quantized.format.dequantize(quantized)
            module.get_parameter(name).copy_(torch.from_numpy(values))
        expected = module(x).numpy()
    assert tiny.relative_error(np.asarray(amx_tvm.load(artifact.path)(x)), expected) < 1e-3
    with pytest.raises(CalibrationError, match="list of calls' inputs"):
        amx_tvm.compile(
            module, example_inputs=(x,), calibration="text.txt", output=tmp_path / "other"
        )
