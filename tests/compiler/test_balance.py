"""Factors on queries and keys: a model computes what it computed, and codes stay as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from amx_tvm import formats
from amx_tvm.compiler.balance import Balance, balanced, scaled
from amx_tvm.frontends import open_model
from amx_tvm.frontends.checkpoint import identify
from amx_tvm.frontends.family_source import FamilySource
from tests.models import tiny

IDS = [3, 7, 1, 12, 30, 9, 9, 2]


# Biases, norms of heads, norms of all heads at once, some channels that do not turn.
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "olmo2", "stablelm"])
def test_the_model_computes_what_it_did(family, tmp_path):
    model = tiny.make(family)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("k_proj.bias", "k_norm.weight")):
                value[::5] *= 40
    source = open_model(tiny.save(model, tmp_path / "model"))
    found, decoder = identify(source)
    balance = Balance(FamilySource(source, found, decoder, source.names()), decoder)
    expected = tiny.logits(model, IDS)
    changed, largest = 0, 1.0
    with torch.no_grad():
        for name, value in model.named_parameters():
            factors = balance.of(name)
            if factors is not None:
                value.mul_(torch.from_numpy(factors).reshape(-1, *[1] * (value.ndim - 1)))
                changed, largest = changed + 1, max(largest, float(factors.max()))
    assert changed == 2 * decoder.num_layers * (1 if decoder.qk_norm else 2)
    assert largest >= 2
    assert tiny.relative_error(tiny.logits(model, IDS), expected) < 1e-4


def test_keys_are_as_loud_as_queries():
    random = np.random.default_rng(2)
    queries, keys = np.exp2(random.uniform(-4, 4, (2, 3, 64))).astype(np.float32)
    keys[0, 5] = 0
    factor = balanced(queries, keys, 24)
    np.testing.assert_array_equal(factor[:, :24], factor[:, 24:48])
    alike = np.log2((queries * factor**2)[1:, 48:] / (keys / factor**2)[1:, 48:])
    assert np.ptp(alike, axis=1).max() < 1e-3
    assert np.isfinite(factor).all() and factor.max() <= 8 and factor.min() >= 1 / 8


@pytest.mark.parametrize("name", [name for name in formats.names() if name != "none"])
def test_codes_stay(name):
    fmt, random = formats.get(name), np.random.default_rng(3)
    made = fmt.quantize(random.standard_normal((6, 64), np.float32))
    factors = np.array([1, 2, 0.5, 8, 0.125, 4], np.float32)
    changed = scaled(made, factors)
    np.testing.assert_array_equal(changed.codes, made.codes)
    expected = fmt.dequantize(made) * factors[:, None]
    np.testing.assert_allclose(fmt.dequantize(changed), expected, rtol=2e-7)
