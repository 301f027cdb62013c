"""Head sizes that are no multiple of 16 are padded in the cache; multiples pay nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import amx_tvm
from amx_tvm.compiler.lowered import lower_source
from amx_tvm.config import QuantizationConfig
from amx_tvm.frontends import open_model
from amx_tvm.targets import resolve
from relax_passes.kernels.cpu.attention.config import stored_channels

from . import tiny

CASES = {
    "llama of 100": ("LlamaConfig", {"head_dim": 100, "attention_bias": True}),
    "qwen3 of 24, normalized": ("Qwen3Config", {"head_dim": 24}),
    "mistral of 6 with a window": ("MistralConfig", {"head_dim": 6, "sliding_window": 24}),
}


def model_of(name):
    kind, fields = CASES[name]
    config = getattr(transformers, kind)(**{**tiny.SHAPE, **fields})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.2)
    return model


@pytest.mark.parametrize("name", sorted(CASES))
def test_logits_equal_torch(name, tmp_path):
    model = model_of(name)
    quantization = QuantizationConfig(
        format="none", activation="float32", head="none", kv_cache="float16"
    )
    half = "qwen3" in name  # one of them with the cache's other type
    artifact = amx_tvm.compile(
        model, quantization=quantization if half else "none", output=tmp_path / "out"
    )
    assert artifact.manifest.kv_cache["head_dim"] % 16 == 0
    ids = np.random.default_rng(1).integers(3, tiny.VOCAB, 40).tolist()
    engine, expected = amx_tvm.load(artifact.path, threads=1), tiny.logits(model, ids)
    bound = 1e-2 if half else 1e-4
    assert tiny.relative_error(np.asarray(engine.logits(ids)), expected) < bound
    with engine.sequence() as sequence:
        sequence.append(ids[:38])
        rows = [sequence.append([token]) for token in ids[38:]]
    assert tiny.relative_error(np.asarray(rows), expected[38:]) < bound


@pytest.mark.parametrize("size, stored", [(2, 16), (16, 16), (80, 80), (100, 112), (128, 128)])
def test_only_what_is_no_multiple_is_padded(size, stored):
    assert stored_channels(size) == stored


def test_multiples_of_16_pay_nothing(tmp_path):
    source = open_model(tiny.save(tiny.make("llama"), tmp_path / "model"))
    config = QuantizationConfig.parse("none").resolve("cpu")
    lowered = lower_source(source, resolve("llvm"), config)
    assert "pad_heads" not in lowered.module.script()
