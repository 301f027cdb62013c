"""Metadata keys of GGUF models: each is read, does nothing, or is refused by name."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from amx_tvm.errors import ModelError
from amx_tvm.frontends import open_model
from amx_tvm.frontends.gguf.keys import DESCRIPTIVE, NEUTRAL
from amx_tvm.frontends.gguf.rope import llama3_factors

from .test_gguf_architectures import UNTIED, YARN_KEYS, random_model, same, write

KEYS = sorted(
    value.removeprefix("{arch}.")
    for group in vars(gguf.Keys).values()
    if isinstance(group, type)
    for value in vars(group).values()
    if isinstance(value, str) and value.startswith("{arch}.") and value.count("{") == 1
)
OLD = ["rope.scale_linear", "attention.unheard_of"]


@pytest.mark.parametrize("key", [*KEYS, *OLD])
def test_every_key_is_read_or_named(tmp_path, key):
    """A key with an odd value changes the configuration or is refused by name; none is skipped."""
    path = tmp_path / "tiny.gguf"

    def config(**more):
        values = {"block_count": 2, "context_length": 128, "embedding_length": 64}
        values |= {"feed_forward_length": 96, "attention.head_count": 4}
        values |= {"attention.head_count_kv": 4, "attention.layer_norm_rms_epsilon": 1} | more
        writer = gguf.GGUFWriter(path, "llama")
        for name, value in values.items():
            writer.add_uint32(f"llama.{name}", value)
        writer.add_tensor("token_embd.weight", np.zeros((8, 64), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return open_model(path).config

    plain = config()
    try:
        changed = config(**{key: 12})
    except ModelError as error:
        assert key in str(error) or "rope.scaling.type" in key
    else:
        original = key == "rope.scaling.original_context_length"  # read with a scaling only
        assert key in DESCRIPTIVE or original or changed != plain


def test_neutral_values_are_taken(tmp_path):
    model = random_model("qwen2", {})
    for key, values in NEUTRAL.items():
        for value in values:
            given = int(value) if isinstance(value, bool) else value
            path = write(tmp_path / "tiny.gguf", "qwen2", model, {key: given})
            assert open_model(path).config["model_type"] == "qwen2"


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        (
            {**YARN_KEYS, "rope.scaling.yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 32.0, "beta_fast": 16.0}
            | {"original_max_position_embeddings": 8},
        ),
        (
            {**YARN_KEYS, "rope.scaling.yarn_log_multiplier": 1.0},
            {"rope_type": "yarn", "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0}
            | {"original_max_position_embeddings": 8},
        ),
        (
            {**YARN_KEYS, "rope.scaling.attn_factor": 0.5},
            {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 8}
            | {"attention_factor": pytest.approx(0.5 * (0.1 * np.log(32) + 1))},
        ),
    ],
)
def test_scaling_keys(tmp_path, keys, expected):
    model = random_model("llama", UNTIED)
    source = open_model(write(tmp_path / "tiny.gguf", "llama", model, keys))
    assert source.config["rope_scaling"] == expected


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    more = {"head_dim": 128, "rope_parameters": {**scaling, "rope_theta": 500000.0}}
    model = random_model("llama", {**UNTIED, **more})
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    factors = plain / model.model.rotary_emb.inv_freq.double().numpy()
    assert factors.max() > 31 and factors.min() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(factors, llama3_factors(128, 500000.0, 32.0), rtol=1e-5)
    keys = {"attention.key_length": 128, "rope.dimension_count": 128}
    path = write(tmp_path / "tiny.gguf", "llama", model, keys, {"rope_freqs": factors})
    source = open_model(path)
    assert source.config["rope_scaling"] == pytest.approx(scaling)
    assert "rope_freqs.weight" not in source.names()
    same(path, model)


def test_other_factors_are_kept_as_a_table(tmp_path):
    model = random_model("llama", UNTIED)
    factors = np.linspace(1, 3, 8)
    path = write(tmp_path / "tiny.gguf", "llama", model, {}, {"rope_freqs": factors})
    scaling = open_model(path).config["rope_scaling"]
    assert scaling["rope_type"] == "longrope" and scaling["attention_factor"] == 1.0
    np.testing.assert_allclose(scaling["short_factor"], factors, rtol=1e-6)
