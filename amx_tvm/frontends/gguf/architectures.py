"""What GGUF architectures are called in Hugging Face's terms: one entry an architecture.

An entry maps tensor names and metadata keys and names what llama.cpp's converter changed in the
weights, so that :mod:`amx_tvm.frontends.gguf.source` can undo it:

* it interleaves the rows of q and k of "llama" models, because ggml rotates neighbouring pairs
  where Hugging Face rotates halves;
* it adds 1 to the norm weights of Gemma, which computes ``x * (1 + w)``.

Metadata keys are written without the architecture in front ("llama.block_count").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

GLOBAL_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

# Tensors of block N: "blk.N.<key>" -> "model.layers.N.<value>".
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

REQUIRED_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL_KEYS = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}


@dataclass(frozen=True)
class GgufArchitecture:
    """One GGUF architecture.

    Attributes
    ----------
    model_type, class_name : str
        "model_type" and the only entry of "architectures" in the configuration.
    block_tensors : dict
        Names within a block that differ from or add to BLOCK_TENSORS.
    keys : dict
        Optional metadata keys beyond OPTIONAL_KEYS.
    defaults : dict
        Configuration values that GGUF does not store.
    interleaved_rope : bool
        Rows of q and k are interleaved in the file.
    norm_offset : float
        What the converter added to norm weights.
    finish : callable, optional
        Called with (configuration, metadata), to set what a table cannot say.
    """

    model_type: str
    class_name: str
    block_tensors: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    interleaved_rope: bool = False
    norm_offset: float = 0.0
    finish: Callable[[dict[str, Any], dict[str, Any]], None] | None = None

    def tensor_name(self, name: str) -> str | None:
        """Return the Hugging Face name of a tensor, or None when it is none of the model's."""
        stem, _, suffix = name.rpartition(".")
        if stem in GLOBAL_TENSORS:
            return f"{GLOBAL_TENSORS[stem]}.{suffix}"
        if not stem.startswith("blk."):
            return None
        _, _, rest = stem.partition(".")
        number, _, key = rest.partition(".")
        target = self.block_tensors.get(key) or BLOCK_TENSORS.get(key)
        return f"model.layers.{number}.{target}.{suffix}" if target and number.isdigit() else None


def _finish_gemma3(config: dict[str, Any], metadata: dict[str, Any]) -> None:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    # Every sixth layer sees the whole context (Gemma 3 report, section 2).
    config["layer_types"] = [
        "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(layers)
    ]
    # The 27B model (62 layers) scales queries by its hidden size, the others by the head's.
    width = config["hidden_size"] // heads if layers == 62 else config["head_dim"]
    config["query_pre_attn_scalar"] = width


ARCHITECTURES = {
    "llama": GgufArchitecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        defaults={"hidden_act": "silu", "mlp_bias": False},
        interleaved_rope=True,
    ),
    "qwen2": GgufArchitecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        defaults={"hidden_act": "silu", "use_sliding_window": False},
    ),
    "qwen3": GgufArchitecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        defaults={"hidden_act": "silu", "use_sliding_window": False},
    ),
    "gemma3": GgufArchitecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        block_tensors=SANDWICH_NORMS,
        keys={"attention.sliding_window": "sliding_window"},
        defaults={
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        norm_offset=1.0,
        finish=_finish_gemma3,
    ),
}
