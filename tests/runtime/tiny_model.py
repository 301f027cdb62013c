"""A Hugging Face directory with a two-layer Llama of random weights, for the real compiler."""

from __future__ import annotations

import json

import numpy as np
import toy_artifact
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
}

NORMS = ("input_layernorm", "post_attention_layernorm")


def write_model(path, head=16):
    """A two-layer Llama with random weights, heads of a size and the toy's tokenizer."""
    random = np.random.default_rng(11)
    hidden, inner = 4 * head, 96
    shapes = {"model.embed_tokens": (300, hidden), "lm_head": (300, hidden)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj": (4 * head, hidden),
            prefix + "self_attn.k_proj": (2 * head, hidden),
            prefix + "self_attn.v_proj": (2 * head, hidden),
            prefix + "self_attn.o_proj": (hidden, 4 * head),
            prefix + "mlp.gate_proj": (inner, hidden),
            prefix + "mlp.up_proj": (inner, hidden),
            prefix + "mlp.down_proj": (hidden, inner),
        }
    weights = {
        f"{name}.weight": (random.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        for name, shape in shapes.items()
    }
    for name in ("model.norm", *(f"model.layers.{i}.{n}" for i in range(2) for n in NORMS)):
        weights[f"{name}.weight"] = np.ones(hidden, np.float32)
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": hidden}))
    toy_artifact.tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return path
