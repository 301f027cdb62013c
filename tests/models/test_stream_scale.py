"""A residual stream that is smaller than the checkpoint's: who is scaled, and who is not."""

import pytest

from amx_tvm.models import find

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 32,
}
BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
BEFORE = ("input_layernorm", "pre_feedforward_layernorm", "self_attn.q_norm")


@pytest.mark.parametrize("name", ["Gemma2", "Gemma3", "Gemma"])
def test_scaled_at_its_sources(name):
    kind = {"Gemma3": "gemma3_text"}.get(name, name.lower())
    values = {**SIZES, "architectures": [f"{name}ForCausalLM"], "model_type": kind}
    family = find(values)
    config = family.configure(values)
    scale = config.stream_scale
    assert (scale < 1) == (name != "Gemma")
    assert config.embedding_scale == 8 * scale
    assert config.stream_eps == pytest.approx(1e-6 * scale**2, rel=1e-12)
    for part in BEHIND:
        found = family.weight(f"model.layers.1.{part}.weight", config)
        assert (found.factor, found.offset) == (scale, 1.0)
    for part in BEFORE:
        assert family.weight(f"model.layers.1.{part}.weight", config).factor == 1.0
    assert family.weight("model.norm.weight", config).factor == 1.0
