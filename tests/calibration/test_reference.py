"""The torch reference against transformers' Llama, and against the formats' own rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from amx_tvm import formats
from amx_tvm.calibration import Plain, Recipe, RotateValues, Smooth, calibrate
from amx_tvm.config import QuantizationConfig
from benchmarks.torch_reference import Reference

from .tiny import TinySource, calibrated_arrays, transformers_logits

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (1, 48), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_float_network_equals_transformers(ids, scaling):
    source = TinySource(rope_scaling=scaling) if scaling else TinySource()
    got = Reference(source)(ids[0].tolist())
    want = transformers_logits(source, source.arrays, ids)[0].numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
        ("mistral", "MistralForCausalLM"),
        ("gemma3_text", "Gemma3ForCausalLM"),
    ],
)
def test_families_equal_transformers_before_and_after_exact_transforms(ids, family, architecture):
    own = {"sliding_window": None}
    if family == "gemma3_text":
        own = {"sliding_window": 64, "query_pre_attn_scalar": 16}
    source = TinySource(model_type=family, architectures=[architecture], **own)
    want = transformers_logits(source, source.arrays, ids)[0].numpy()
    np.testing.assert_allclose(Reference(source)(ids[0].tolist()), want, rtol=1e-4, atol=1e-4)
    recipe = Recipe("exact", (RotateValues(), Smooth(), Plain()))
    config = QuantizationConfig(format="amxfp4", overrides={"*": "none"})
    result = calibrate(source, config, ids, recipe)
    got = transformers_logits(source, calibrated_arrays(source, result), ids)[0].numpy()
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_rounded_weights_equal_transformers(ids):
    source = TinySource()
    arrays = {
        name: formats.get("nvfp4").quantize_dequantize(a) if "proj" in name else a
        for name, a in source.arrays.items()
    }
    want = transformers_logits(source, arrays, ids)[0].numpy()
    got = Reference(source, "nvfp4")(ids[0].tolist())
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    result = calibrate(source, "nvfp4", ids, "gptq")
    want = transformers_logits(source, calibrated_arrays(source, result), ids)[0].numpy()
    got = Reference(source, calibration=result)(ids[0].tolist())
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_activations_are_rounded_too(ids):
    source = TinySource()
    weight_only = Reference(source, "amxfp4")(ids[0].tolist())
    both = Reference(source, "amxfp4-w4a4")(ids[0].tolist())
    exact = Reference(source)(ids[0].tolist())
    error = np.linalg.norm(weight_only - exact)
    assert np.linalg.norm(both - exact) > 1.1 * error > 0
