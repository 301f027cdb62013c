"""Every entry of the architecture table against a tiny random ``transformers`` model of its type.

The model is written to GGUF as llama.cpp's converter does (tensor names from the gguf package's own
map, q and k rows interleaved for llama, 1 added to Gemma's norms), read back, and rebuilt from the
configuration that was read: the same weights and the same logits.
"""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm.frontends import open_model
from amx_tvm.frontends.gguf.architectures import ARCHITECTURES
from amx_tvm.frontends.gguf.config import llama3_factors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

BLOCKS = 7  # Gemma 3 has a layer with global attention only from 6 on
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# GGUF architecture -> (model_type, more configuration, more keys in the file)
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": False, "attention_bias": False}, {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}, {}),
    "qwen3": ("qwen3", {"head_dim": 32}, {"attention.key_length": 32}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32},
        {"attention.key_length": 32, "attention.sliding_window": 16},
    ),
}


def interleave(weight, heads):
    """Permute rows as convert_hf_to_gguf.py does for llama."""
    rows = weight.shape[0]
    grouped = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(grouped.swapaxes(1, 2)).reshape(weight.shape)


def write(path, architecture, model, keys, rope_factors=None):
    config = model.config
    theta = config.rope_parameters
    theta = theta.get("full_attention", theta)["rope_theta"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(theta)
    for key, value in keys.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    names = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(names[architecture], BLOCKS)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        values = tensor.float().numpy().copy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            q = "q_proj" in name
            heads = config.num_attention_heads if q else config.num_key_value_heads
            values = interleave(values, heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_model(model_type, more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1:  # biases of 0 and norms of 1 would hide mistakes
                tensor.add_(torch.randn_like(tensor) * 0.3)
            assert tensor.abs().sum() > 0, name
    return model


def rebuilt(source):
    config = dict(source.config)
    model_type = config.pop("model_type")
    config = transformers.AutoConfig.for_model(model_type, **config)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    weights = {name: torch.from_numpy(values) for name, values in source}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def same_logits(first, second):
    ids = torch.arange(90).remainder(SIZES["vocab_size"])[None]
    with torch.no_grad():
        expected, given = first(ids).logits, second(ids).logits
    assert expected.std() > 1e-3
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_every_entry_has_a_model_here():
    assert set(MODELS) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_model_survives_the_way_through_gguf(tmp_path, architecture):
    model_type, more, keys = MODELS[architecture]
    model = random_model(model_type, more)
    source = open_model(write(tmp_path / "tiny.gguf", architecture, model, keys))
    state = model.state_dict()
    for name, values in source:
        # Gemma's norms lose their last bits to the 1 that the converter adds.
        np.testing.assert_allclose(values, state[name].numpy(), atol=2e-7, rtol=0, err_msg=name)
    assert source.config["tie_word_embeddings"] == model.config.tie_word_embeddings
    same_logits(model, rebuilt(source))


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    more = {
        "head_dim": 128,
        "rope_parameters": {**scaling, "rope_theta": 500000.0},
        "tie_word_embeddings": True,
    }
    model = random_model("llama", more)
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    factors = plain / model.model.rotary_emb.inv_freq.double().numpy()
    assert factors.max() > 31 and factors.min() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(factors, llama3_factors(128, 500000.0, 32.0), rtol=1e-5)
    keys = {"attention.key_length": 128, "rope.dimension_count": 128}
    source = open_model(write(tmp_path / "tiny.gguf", "llama", model, keys, factors))
    assert source.config["rope_scaling"] == pytest.approx(scaling)
    assert "rope_freqs.weight" not in source.names()
    same_logits(model, rebuilt(source))


def test_other_factors_are_kept_as_a_table(tmp_path):
    model = random_model("llama", {"tie_word_embeddings": True})
    factors = np.linspace(1, 3, 8)
    source = open_model(write(tmp_path / "tiny.gguf", "llama", model, {}, factors))
    scaling = source.config["rope_scaling"]
    assert scaling["rope_type"] == "longrope" and scaling["attention_factor"] == 1.0
    np.testing.assert_allclose(scaling["short_factor"], factors, rtol=1e-6)
