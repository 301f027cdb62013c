"""What GGUF architectures are called in Hugging Face's terms: one entry an architecture.

An entry maps tensor names and metadata keys and names what llama.cpp's converter changed in the
weights, so that :mod:`amx_tvm.frontends.gguf.source` can undo it:

* it interleaves the rows of q and k of "llama" models, because ggml rotates neighbouring pairs
  where Hugging Face rotates halves;
* it adds 1 to the norm weights of Gemma, which computes ``x * (1 + w)``;
* it transposes GPT-2's linears: those get the names that the family's module has.

Experts are stacks [experts, N, K] with gate and up apart. Metadata keys are written without the
architecture in front ("llama.block_count").
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from amx_tvm.frontends.gguf.keys import ModelKeys

GLOBAL_TENSORS = {
    "token_embd": "model.embed_tokens",
    "position_embd": "model.wpe",
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
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GPT2_TENSORS = {
    "attn_norm": "ln_1",
    "attn_qkv": "self_attn.qkv_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
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
WINDOW = {"attention.sliding_window": "sliding_window"}
EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# One tensor an expert, as files of before 2024-04 have it.
_ONE_EXPERT = re.compile(r"(ffn_gate|ffn_up|ffn_down)\.(\d+)")


@dataclass(frozen=True)
class GgufArchitecture:
    """One GGUF architecture.

    Attributes
    ----------
    model_type, class_name : str
        "model_type" and the only entry of "architectures" in the configuration.
    block_tensors : dict
        Names within a block that differ from or add to BLOCK_TENSORS.
    renamed : dict
        Required metadata keys that differ from REQUIRED_KEYS: field -> key.
    keys : dict
        Optional metadata keys beyond OPTIONAL_KEYS.
    defaults : dict
        Configuration values that GGUF does not store.
    interleaved_rope : bool
        Rows of q and k are interleaved in the file.
    rotates : bool
        Positions are rotary embeddings.
    norm_offset : float
        What the converter added to norm weights.
    finish : callable, optional
        Called with (configuration, keys), to set what a table cannot say.
    """

    model_type: str
    class_name: str
    block_tensors: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    interleaved_rope: bool = False
    rotates: bool = True
    norm_offset: float = 0.0
    finish: Callable[[dict[str, Any], ModelKeys], None] | None = None

    @property
    def required(self) -> dict[str, str]:
        """Keys that must be there, with the configuration's fields."""
        return {self.renamed.get(name, key): name for key, name in REQUIRED_KEYS.items()}

    @property
    def optional(self) -> dict[str, str]:
        """Keys that may be there, with the configuration's fields."""
        return {**OPTIONAL_KEYS, **self.keys}

    def tensor_name(self, name: str) -> str | None:
        """Return the Hugging Face name of a tensor, or None when it is none of the model's."""
        stem, _, suffix = name.rpartition(".")
        if stem in GLOBAL_TENSORS:
            return f"{GLOBAL_TENSORS[stem]}.{suffix}"
        if not stem.startswith("blk."):
            return None
        _, _, rest = stem.partition(".")
        number, _, key = rest.partition(".")
        if not number.isdigit():
            return None
        target = self.block_tensors.get(key) or BLOCK_TENSORS.get(key)
        single = _ONE_EXPERT.fullmatch(key)
        if single and not target:
            part = BLOCK_TENSORS[single[1]].removeprefix("mlp.")
            target = f"mlp.experts.{single[2]}.{part}"
        if target == SINKS:
            return f"model.layers.{number}.{target}"
        return f"model.layers.{number}.{target}.{suffix}" if target else None


SINKS = "self_attn.sinks"  # a parameter of its own, without ".weight"


def _finish_llama(config: dict[str, Any], keys: ModelKeys) -> None:
    """Tell Mixtral and Mistral from Llama: one architecture holds all three."""
    if config.get("num_experts"):
        config["architectures"], config["model_type"] = ["MixtralForCausalLM"], "mixtral"
        config["num_local_experts"] = config["num_experts"]
    elif config.get("sliding_window"):
        # llama.cpp attends to everything; the window is what the model was trained with.
        config["architectures"], config["model_type"] = ["MistralForCausalLM"], "mistral"


def _finish_gemma2(config: dict[str, Any], keys: ModelKeys) -> None:
    # The 27B model (46 layers) scales queries by its hidden size, the others by the head's.
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // heads if layers == 46 else config["head_dim"]
    )


def _finish_gemma3(config: dict[str, Any], keys: ModelKeys) -> None:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    # The 27B model (62 layers) scales queries by its hidden size, the others by the head's.
    width = config["hidden_size"] // heads if layers == 62 else config["head_dim"]
    config["query_pre_attn_scalar"] = width


def _finish_layer_norm(config: dict[str, Any], keys: ModelKeys) -> None:
    config["layer_norm_eps"] = config["rms_norm_eps"]


def _finish_olmo2(config: dict[str, Any], keys: ModelKeys) -> None:
    """Tell OLMo 3 by its window."""
    if config.get("sliding_window"):
        config["architectures"], config["model_type"] = ["Olmo3ForCausalLM"], "olmo3"


def _finish_gpt2(config: dict[str, Any], keys: ModelKeys) -> None:
    config.update(
        n_embd=config["hidden_size"],
        n_head=config["num_attention_heads"],
        n_layer=config["num_hidden_layers"],
        n_positions=config["max_position_embeddings"],
        n_inner=config["intermediate_size"],
        layer_norm_epsilon=config["rms_norm_eps"],
    )


def _finish_gpt_oss(config: dict[str, Any], keys: ModelKeys) -> None:
    keys.get("feed_forward_length")  # beside the experts' own size; not used
    keys.equal("expert_gating_func", 3)  # softmax over the chosen experts' logits
    if config["rope_scaling"]:
        # llama.cpp rounds the ramp's ends; the model's own configuration says not to.
        config["rope_scaling"]["truncate"] = False


SILU = {"hidden_act": "silu"}
LLAMA = {**SILU, "attention_bias": False, "mlp_bias": False}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}
NO_WINDOW = {**SILU, "use_sliding_window": False}
LAYER_NORM = {"rms_norm_eps": "attention.layer_norm_epsilon"}
POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
LOGITS = {"logit_scale": "logit_scale"}

ARCHITECTURES = {
    "llama": GgufArchitecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        keys={**WINDOW, **EXPERTS},
        defaults=LLAMA,
        interleaved_rope=True,
        finish=_finish_llama,
    ),
    "mistral3": GgufArchitecture(
        model_type="mistral",
        class_name="MistralForCausalLM",
        keys=WINDOW,
        defaults=SILU,
        interleaved_rope=True,
    ),
    "qwen2": GgufArchitecture(
        model_type="qwen2", class_name="Qwen2ForCausalLM", defaults=NO_WINDOW
    ),
    "qwen3": GgufArchitecture(
        model_type="qwen3", class_name="Qwen3ForCausalLM", defaults=NO_WINDOW
    ),
    "qwen3moe": GgufArchitecture(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        keys={
            **EXPERTS,
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_weights_norm": "norm_topk_prob",
        },
        # llama.cpp computes shares over the chosen experts always.
        defaults={**NO_WINDOW, "norm_topk_prob": True},
    ),
    "gemma2": GgufArchitecture(
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        block_tensors=SANDWICH_NORMS,
        keys={**WINDOW, **CAPS},
        defaults=GEMMA,
        norm_offset=1.0,
        finish=_finish_gemma2,
    ),
    "gemma3": GgufArchitecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        block_tensors=SANDWICH_NORMS,
        keys={**WINDOW, **CAPS, "rope.freq_base_swa": "rope_local_base_freq"},
        defaults={
            **GEMMA,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        norm_offset=1.0,
        finish=_finish_gemma3,
    ),
    "phi3": GgufArchitecture(
        model_type="phi3",
        class_name="Phi3ForCausalLM",
        block_tensors={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        # llama.cpp attends to everything; the window is what the model was trained with.
        keys=WINDOW,
        defaults=SILU,
    ),
    "smollm3": GgufArchitecture(
        model_type="smollm3",
        class_name="SmolLM3ForCausalLM",
        # Every fourth layer has no positions, which no key says.
        defaults={**NO_WINDOW, "no_rope_layer_interval": 4},
        interleaved_rope=True,
    ),
    "olmo2": GgufArchitecture(
        model_type="olmo2",
        class_name="Olmo2ForCausalLM",
        block_tensors=POST_NORMS,
        keys=WINDOW,
        defaults=SILU,
        finish=_finish_olmo2,
    ),
    "granite": GgufArchitecture(
        model_type="granite",
        class_name="GraniteForCausalLM",
        keys={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",  # logits are divided by it, in llama.cpp as well
        },
        defaults=LLAMA,
        interleaved_rope=True,
    ),
    "exaone4": GgufArchitecture(
        model_type="exaone4",
        class_name="Exaone4ForCausalLM",
        block_tensors=POST_NORMS,
        keys=WINDOW,
        defaults=SILU,
    ),
    "command-r": GgufArchitecture(
        model_type="cohere",
        class_name="CohereForCausalLM",
        renamed=LAYER_NORM,
        keys=LOGITS,
        defaults=SILU,
        finish=_finish_layer_norm,
    ),
    "cohere2": GgufArchitecture(
        model_type="cohere2",
        class_name="Cohere2ForCausalLM",
        renamed=LAYER_NORM,
        keys={**WINDOW, **LOGITS},
        defaults=SILU,
        finish=_finish_layer_norm,
    ),
    "seed_oss": GgufArchitecture(
        model_type="seed_oss",
        class_name="SeedOssForCausalLM",
        block_tensors={"post_attention_norm": "post_attention_layernorm"},
        defaults={**SILU, "attention_bias": False},
    ),
    "stablelm": GgufArchitecture(
        model_type="stablelm",
        class_name="StableLmForCausalLM",
        renamed=LAYER_NORM,
        keys={"use_parallel_residual": "use_parallel_residual"},
        defaults={**SILU, "partial_rotary_factor": 1.0},
        finish=_finish_layer_norm,
    ),
    "ernie4_5": GgufArchitecture(
        model_type="ernie4_5", class_name="Ernie4_5ForCausalLM", defaults=SILU
    ),
    "glm4": GgufArchitecture(
        model_type="glm4",
        class_name="Glm4ForCausalLM",
        block_tensors={
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
            "ffn_up": "mlp.gate_up_proj",
        },
        defaults={**SILU, "attention_bias": False, "partial_rotary_factor": 1.0},
    ),
    "gemma": GgufArchitecture(
        model_type="gemma",
        class_name="GemmaForCausalLM",
        defaults={"hidden_act": "gelu_pytorch_tanh"},
        norm_offset=1.0,
    ),
    "olmoe": GgufArchitecture(
        model_type="olmoe",
        class_name="OlmoeForCausalLM",
        keys=EXPERTS,
        # llama.cpp computes shares over all experts.
        defaults={**SILU, "norm_topk_prob": False},
    ),
    "gpt2": GgufArchitecture(
        model_type="gpt2",
        class_name="GPT2LMHeadModel",
        block_tensors=GPT2_TENSORS,
        renamed={"rms_norm_eps": "attention.layer_norm_epsilon"},
        defaults={"activation_function": "gelu_new"},
        rotates=False,
        finish=_finish_gpt2,
    ),
    "gpt-oss": GgufArchitecture(
        model_type="gpt_oss",
        class_name="GptOssForCausalLM",
        block_tensors={
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks": SINKS,
            "ffn_gate_inp": "mlp.router",
        },
        renamed={"intermediate_size": "expert_feed_forward_length"},
        keys={**WINDOW, **EXPERTS},
        defaults=SILU,
        finish=_finish_gpt_oss,
    ),
}
