"""Mixtures of experts at the shapes of published configurations, for `benchmarks.gpu.models`.

Weights are named as their files name them: gpt-oss's experts are stacks of MXFP4 blocks, those of
the others stacks as they lie in memory.
"""

from __future__ import annotations

from typing import Any

COMMON = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}
MIXTURES: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {
        **COMMON,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    "qwen3-30b-a3b": {
        **COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
    "mixtral-8x7b": {
        **COMMON,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
}
# Rounding that changes one choice changes the rest of a text: kernels are compared on two layers.
for _name in tuple(MIXTURES):
    MIXTURES[f"{_name}-2"] = {**MIXTURES[_name], "num_hidden_layers": 2}


def expert_shapes(config: dict[str, Any], at: str) -> dict[str, tuple[int, ...]]:
    """Return what stands in a dense layer's MLP's place, by name."""
    hidden, family = config["hidden_size"], config["model_type"]
    experts = config.get("num_experts") or config["num_local_experts"]
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    gate_up, down = (experts, 2 * inner, hidden), (experts, hidden, inner)
    if family == "gpt_oss":
        heads = config["num_attention_heads"]
        q, kv = (config[k] * config["head_dim"] for k in (f"num_{n}_heads" for n in _HEADS))
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
        return {
            f"{at}.mlp.router.weight": (experts, hidden),
            f"{at}.mlp.router.bias": (experts,),
            f"{at}.mlp.experts.gate_up_proj_blocks": gate_up,
            f"{at}.mlp.experts.gate_up_proj_bias": gate_up[:2],
            f"{at}.mlp.experts.down_proj_blocks": down,
            f"{at}.mlp.experts.down_proj_bias": down[:2],
            f"{at}.self_attn.sinks": (heads,),
            **{f"{at}.self_attn.{name}.bias": (n,) for name, n in rows.items()},
        }
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    found = {
        f"{at}.{block}.gate.weight": (experts, hidden),
        f"{at}.mlp.experts.gate_up_proj": gate_up,
        f"{at}.mlp.experts.down_proj": down,
    }
    if family == "qwen3_moe":
        d = config["head_dim"]
        found |= {f"{at}.self_attn.{n}_norm.weight": (d,) for n in ("q", "k")}
    return found


_HEADS = ("attention", "key_value")
