"""Tiny random models of every family: a configuration each, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models

from amx_tvm import formats

VOCAB = 96
WINDOW = 24  # below the length of the test's sequences, so that local layers differ
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LOCAL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**LOCAL, "head_dim": 32, "query_pre_attn_scalar": 24, "final_logit_softcapping": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}

EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

GEMMA_4 = {
    "sliding_window": WINDOW,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "head_dim": 16,
    "global_head_dim": 32,
    "final_logit_softcapping": 3.0,
}

# Family: the transformers configuration class and what differs from SHAPE.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3, "attention_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", {**GEMMA, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "olmo2": ("Olmo2Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
        | {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 32, "num_local_experts": 5, "num_experts_per_tok": 2, **LOCAL}
        | {"rope_parameters": YARN, "swiglu_limit": 1.0},
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": (
        "GraniteConfig",
        {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.3}
        | {"logits_scaling": 2.0},
    ),
    # transformers 5.23 does not look for "truncate" in the dictionary of a kind of layers.
    "olmo3": (
        "Olmo3Config",
        {**LOCAL, "rope_parameters": {"full_attention": {**YARN, "truncate": True}}},
    ),
    "exaone4": ("Exaone4Config", LOCAL),
    "cohere": ("CohereConfig", {"logit_scale": 0.5}),
    "cohere2": ("Cohere2Config", {**LOCAL, "logit_scale": 0.5}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 16}),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True}),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 32, "use_bias": True}),
    "glm": ("GlmConfig", {"head_dim": 32}),
    "glm4": ("Glm4Config", {"head_dim": 32}),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "ministral3": (
        "Ministral3Config",
        {"head_dim": 32, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3}},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**LATENT, "n_group": 4, "topk_group": 2}
        | {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy"}
        | {"n_group": 4, "topk_group": 2},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {**EXPERTS, "head_dim": 32, "use_qk_norm": True, "attention_bias": True}
        | {"partial_rotary_factor": 0.5},
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        {**LATENT, "v_head_dim": 32, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {**GEMMA_4, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB}
        | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    ),
    "granite4": (
        "GraniteMoeHybridConfig",
        {"num_local_experts": 0, "shared_intermediate_size": 80, "position_embedding_type": "rope"}
        | {"layer_types": ["full_attention"] * 2, "attention_multiplier": 0.3}
        | {"residual_multiplier": 0.7, "logits_scaling": 3.0, "embedding_multiplier": 2.0}
        | {"mamba_expand": 2, "mamba_n_heads": 8},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 5, "num_experts_per_tok": 2}),
}


def make(family: str, seed: int = 0, **more: Any) -> torch.nn.Module:
    """Build the model of a family in float32, every parameter random (norms and biases too).

    ``more`` are fields of its configuration beside the family's.
    """
    class_name, differences = {**CASES, **VARIANTS}[family]
    differences = {**differences, **more}
    fields = differences if family == "gpt2" else {**SHAPE, **differences}
    config = getattr(transformers, class_name)(**fields)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.2)
            elif "embed" in name or "wte" in name or "wpe" in name:
                value.copy_(torch.randn_like(value) * 0.3)
            else:
                value.copy_(torch.randn_like(value) * 1.5 * value.shape[-1] ** -0.5)
        for name, value in model.named_buffers():
            if name.endswith("layer_scalar"):
                value.copy_(torch.rand_like(value) + 0.5)
            if name.endswith("e_score_correction_bias"):
                value.copy_(torch.randn_like(value) * 0.1)
    return model


def save(model: torch.nn.Module, directory: Path) -> Path:
    """Write the model with a tokenizer that knows one word a token."""
    model.save_pretrained(directory)
    words = {f"w{index}": index for index in range(VOCAB)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    return directory


def fake_quantize(model: torch.nn.Module, linear: str, head: str) -> torch.nn.Module:
    """Round weights in place: linears to one format, embedding and head to another."""
    done = set()
    with torch.no_grad():
        for name, module in model.named_modules():
            transposed = type(module).__name__ == "Conv1D"
            is_head = name.endswith(("lm_head", "embed_tokens", "wte", "word_embeddings"))
            if not (transposed or is_head or isinstance(module, torch.nn.Linear)):
                continue
            weight = module.weight
            if weight.data_ptr() in done:
                continue
            done.add(weight.data_ptr())
            fmt = formats.get(head if is_head else linear)
            array = weight.numpy().T if transposed else weight.numpy()
            rounded = fmt.dequantize(fmt.quantize(np.ascontiguousarray(array)))
            weight.copy_(torch.from_numpy(rounded.T if transposed else rounded))
        for name, stack in model.named_parameters():
            if ".experts." in name and stack.ndim == 3:
                _round_experts(
                    stack, formats.get(linear), transposed="GptOss" in type(model).__name__
                )
    return model


def _round_experts(stack: torch.Tensor, fmt: formats.Format, transposed: bool) -> None:
    """Round the experts' weights [experts, N, K], or [experts, K, N], in place."""
    array = stack.numpy().swapaxes(1, 2) if transposed else stack.numpy()
    rounded = fmt.dequantize(fmt.quantize(np.ascontiguousarray(array)))
    stack.copy_(torch.from_numpy(rounded.swapaxes(1, 2) if transposed else rounded))


def logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """Return float32 [len(ids), vocab]."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest deviation over the root mean square of what was expected."""
    return float(np.abs(got - expected).max() / np.sqrt(np.mean(expected**2)))
