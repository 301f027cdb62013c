"""Quantized attention: kernels against the torch twin, and engines whose attention is quantized."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from amx_tvm import formats
from amx_tvm.calibration.attention import exact, quantized, rounded
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import FormatError, ModelError, TargetError
from benchmarks.torch_reference import Reference
from relax_passes.tir_pipeline import PIPELINE

from .tiny import TinySource

HEADS, KV_HEADS = 4, 2


def operands(tokens: int, d: int) -> list[np.ndarray]:
    """Queries, keys and values [tokens, heads, d] with a few loud channels."""
    rng = np.random.default_rng(tokens)
    shapes = [(tokens, heads, d) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [(rng.normal(size=s) * np.exp(rng.normal(size=d))).astype(np.float32) for s in shapes]


def twin(q, k, v, name: str) -> np.ndarray:
    """The torch computation for all positions, [tokens, heads, d]."""
    parts = [torch.from_numpy(x).transpose(0, 1)[None] for x in (q, k, v)]
    out = quantized(*parts, q.shape[-1] ** -0.5, formats.get(name))
    return out[0].transpose(0, 1).numpy()


class Kernels:
    """The kernels of a quantized cache, called as the runtime calls them."""

    def __init__(self, name: str, d: int) -> None:
        from relax_passes.attention_spec import AttentionSpec
        from relax_passes.kernels.cpu.attention import KVCacheConfig
        from relax_passes.kernels.cpu.attention.cache import kernels

        self.d, self.format = d, formats.get(name)
        self.config = KVCacheConfig((AttentionSpec(0, HEADS, KV_HEADS, d, d**-0.5),), quantize=name)
        self.functions, self.compiled = kernels(self.config, {"kind": "llvm"}), {}

    def call(self, name: str, *arguments) -> None:
        import tvm

        if name not in self.compiled:
            module = tvm.IRModule({"main": self.functions[name]})
            target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
            self.compiled[name] = tvm.compile(module, target=target, tir_pipeline=PIPELINE)["main"]
        self.compiled[name](*arguments)

    def rounded(self, x: np.ndarray) -> np.ndarray:
        return self.format.quantize_dequantize(x, activation=True)

    def outputs(self, tokens: int):
        return tensor(np.zeros((tokens, HEADS, self.d), np.float32)), tensor(
            np.zeros((tokens, HEADS), np.float32)
        )

    def ragged(self, q, k, v, position: int = 0) -> tuple[np.ndarray, np.ndarray]:
        n = len(q)
        out, lse = self.outputs(n)
        self.call(
            "prefill_ragged", tensor(self.rounded(q)), ints(0, n), tensor(self.rounded(k)),
            tensor(v), ints(0, n), ints(*range(n)), ints(position), out, lse,
            1, 0, 1.0, 1.0, self.d**-0.5,
        )  # fmt: skip
        return out.numpy(), lse.numpy()

    def pages(self, k, v):
        """Pages 2, 0 and 1 hold the tokens."""
        n, size = len(k), self.config.page_size
        pages = tensor(np.full((3, 2, KV_HEADS, size, self.d), np.nan, np.float32))
        order = [2, 0, 1]
        places = [order[i // size] * size + i % size for i in range(n)]
        self.call("append", pages, tensor(self.rounded(k)), tensor(v), ints(*places))
        count = -(-n // size)
        return pages, ints(0, count), ints(*order[:count]), ints(n - (count - 1) * size)

    def paged(self, q, k, v) -> tuple[np.ndarray, np.ndarray]:
        n = len(q)
        out, lse = self.outputs(n)
        self.call(
            "prefill_paged", tensor(self.rounded(q)), ints(0, n), *self.pages(k, v),
            ints(0), ints(*range(n)), out, lse, 1, 0, 1.0, 1.0, self.d**-0.5,
        )  # fmt: skip
        return out.numpy(), lse.numpy()

    def decode(self, q, k, v) -> np.ndarray:
        out, lse = self.outputs(1)
        self.call(
            "decode", tensor(self.rounded(q[-1:])), *self.pages(k, v), ints(0), ints(len(k) - 1),
            out, lse, 0, 1.0, 1.0, self.d**-0.5,
        )  # fmt: skip
        return out.numpy()[0]


def tensor(array: np.ndarray):
    import tvm

    return tvm.runtime.tensor(np.ascontiguousarray(array))


def ints(*values: int):
    return tensor(np.array(values, np.int32))


def close(got: np.ndarray, want: np.ndarray) -> None:
    """Equal to 1e-3 for every query; they differ by float32 rounding where nothing is a tie."""
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() < 1e-3, error.max()


@pytest.mark.parametrize("name", ["amxfp4", "nvfp4", "mxfp4", "amxfp4-e4m3-tensor"])
def test_new_tokens_equal_the_torch_twin(name):
    q, k, v = operands(70, 32)
    close(Kernels(name, 32).ragged(q, k, v)[0], twin(q, k, v, name))


def test_a_decoded_token_equals_the_same_token_prefilled():
    kernels = Kernels("amxfp4", 64)
    q, k, v = operands(150, 64)
    want = twin(q, k, v, "amxfp4")
    for count in (1, 33, 150):
        close(kernels.decode(q[:count], k[:count], v[:count]), want[count - 1])


def test_a_second_pass_sees_the_cache_as_the_first_left_it():
    """Keys in pages and new ones, merged by their log-sum-exps, equal one pass over all."""
    kernels = Kernels("amxfp4", 32)
    q, k, v = operands(110, 32)
    old, old_lse = kernels.paged(q[64:], k[:64], v[:64])
    new, new_lse = kernels.ragged(q[64:], k[64:], v[64:], 64)
    share = 1 / (1 + np.exp2(new_lse - old_lse))[..., None]
    close(share * old + (1 - share) * new, twin(q, k, v, "amxfp4")[64:])


def test_queries_and_keys_are_the_formats_own_rounding():
    for name in ("amxfp4", "nvfp4", "amxfp4-pot-r"):
        kernels = Kernels(name, 48)
        qkv = np.concatenate(operands(5, 48), axis=1)
        got = [tensor(np.zeros((5, h, 48), np.float32)) for h in (HEADS, KV_HEADS, KV_HEADS)]
        kernels.call("split_rotary", tensor(qkv), ints(*range(5)), *got, 0)
        want = kernels.rounded(qkv)
        for part, start, stop in ((got[0], 0, HEADS), (got[1], HEADS, HEADS + KV_HEADS)):
            np.testing.assert_allclose(part.numpy(), want[:, start:stop], rtol=1e-6)
        np.testing.assert_array_equal(got[2].numpy(), qkv[:, HEADS + KV_HEADS :])


@pytest.mark.parametrize("name", ["amxfp4", "mxfp4", "nvfp4", "amxfp4-pot", "amxfp4-pot-r"])
def test_the_twin_rounds_as_the_format_does(name):
    """Within the range of the scale type; NVFP4's float32 is a power of two here, which is 1."""
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2)) * 3
    fmt = formats.get(name)
    given = {"tensor_scale": 1.0} if fmt.row_scaled else {}
    want = fmt.dequantize(fmt.quantize(x.numpy(), activation=True, **given))
    np.testing.assert_allclose(rounded(x, fmt).numpy(), want, rtol=1e-6)
    tiny = rounded(x * 2.0**-40, fmt) * 2.0**40
    np.testing.assert_allclose(tiny.numpy(), rounded(x, fmt).numpy(), rtol=1e-6)


def test_the_twin_is_causal_and_close_to_exact_attention():
    q, k, v = (torch.from_numpy(x).transpose(0, 1)[None] for x in operands(80, 32))
    fmt = formats.get("amxfp4")
    whole = quantized(q, k, v, 0.1, fmt)
    part = quantized(q[:, :, :50], k[:, :, :50], v[:, :, :50], 0.1, fmt)
    torch.testing.assert_close(whole[:, :, :50], part, rtol=1e-4, atol=1e-5)
    error = (whole - exact(q, k, v, 0.1)).norm() / exact(q, k, v, 0.1).norm()
    assert 0.02 < error < 0.3


def test_refusals(tmp_path):
    from amx_tvm.compiler import compile as compile_model

    source = TinySource()
    with pytest.raises(FormatError, match="use amxfp4-w4a4"):
        compile_model(source, quantization="amxfp4", attention=True, output=tmp_path / "a")
    with pytest.raises(FormatError, match="cannot be quantized to 'int4'"):
        compile_model(source, quantization="int4-w4a4", attention=True, output=tmp_path / "a")
    with pytest.raises(TargetError, match="for CPUs only"):
        compile_model(
            TinySource(head_dim=64),
            target="cuda:sm_90a",
            quantization="amxfp4-w4a4",
            attention=True,
            output=tmp_path / "a",
        )
    sliding = TinySource(
        architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=32
    )
    with pytest.raises(ModelError, match="sliding"):
        compile_model(sliding, quantization="amxfp4-w4a4", attention=True, output=tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amxfp4", "mxfp4"])
def test_engine_equals_the_reference(tmp_path, name):
    from amx_tvm.compiler import compile as compile_model
    from amx_tvm.runtime import load

    source = TinySource(head_dim=32)
    config = QuantizationConfig(name, "w4a4", head="none", attention=True)
    compile_model(source, quantization=config, output=tmp_path / "artifact")
    engine = load(tmp_path / "artifact")
    ids = torch.randint(0, 64, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    got, want = engine.logits(ids), Reference(source, config)(ids)
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    # A value may sit on a tie, which float32 noise decides either way; later positions see it.
    assert np.median(error) < 1e-5 and (error < 1e-3).mean() > 0.6, error
    plain = Reference(source, QuantizationConfig(name, "w4a4", head="none"))(ids)
    assert np.linalg.norm(got - plain) > 0.05 * np.linalg.norm(plain)
    text = engine.generate(ids[:40], max_new_tokens=8, ignore_eos=True).token_ids
    again = engine.logits(ids[:40] + text[:-1])
    assert again[39:].argmax(-1).tolist() == text
