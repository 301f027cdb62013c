"""A tiny random Llama as a ModelSource, and the same network computed apart from the library."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from amx_tvm.formats import Quantized
from amx_tvm.frontends import ModelSource

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


class TinySource(ModelSource):
    """Weights with a few loud channels, as trained models have them."""

    def __init__(self, seed: int = 0, **changes: Any) -> None:
        self.name, self.config = "tiny", {**CONFIG, **changes}
        self.generation_config = {"eos_token_id": [0]}
        rng = np.random.default_rng(seed)
        c = self.config
        h, i, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
        q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
        shapes = {"model.embed_tokens.weight": (c["vocab_size"], h), "model.norm.weight": (h,)}
        for n in range(c["num_hidden_layers"]):
            p = f"model.layers.{n}."
            shapes |= {
                p + "input_layernorm.weight": (h,),
                p + "self_attn.q_proj.weight": (q, h),
                p + "self_attn.k_proj.weight": (kv, h),
                p + "self_attn.v_proj.weight": (kv, h),
                p + "self_attn.o_proj.weight": (h, q),
                p + "post_attention_layernorm.weight": (h,),
                p + "mlp.gate_proj.weight": (i, h),
                p + "mlp.up_proj.weight": (i, h),
                p + "mlp.down_proj.weight": (h, i),
            }
            if c["model_type"] == "qwen2":
                for part, size in (("q", q), ("k", kv), ("v", kv)):
                    shapes[f"{p}self_attn.{part}_proj.bias"] = (size,)
            if c["model_type"] in ("qwen3", "gemma3_text"):
                shapes |= {f"{p}self_attn.{part}_norm.weight": (d,) for part in "qk"}
            if c["model_type"] == "gemma3_text":
                around = ("pre_feedforward", "post_feedforward")
                shapes |= {f"{p}{part}_layernorm.weight": (h,) for part in around}
        self.arrays = {}
        for name, shape in shapes.items():
            if len(shape) == 1:
                array = np.exp(rng.normal(0, 0.7, shape))
            else:
                array = rng.normal(0, shape[1] ** -0.5 * 1.5, shape)
            self.arrays[name] = array.astype(np.float32)
        self.raw: dict[str, Quantized] = {}

    def names(self) -> list[str]:
        return list(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def dtype(self, name: str) -> str:
        return "f32"

    def load(self, name: str) -> np.ndarray:
        return self.arrays[name].copy()

    def load_raw(self, name: str) -> Quantized | None:
        return self.raw.get(name)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())

    def write_tokenizer(self, directory: Any) -> list[str]:
        from pathlib import Path

        from tokenizers import Tokenizer, models, pre_tokenizers

        tokenizer = Tokenizer(models.BPE({chr(48 + n): n for n in range(64)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(Path(directory) / "tokenizer.json"))
        return ["tokenizer.json"]

    def digest(self) -> str:
        return "tiny"


def transformers_logits(source: ModelSource, arrays: dict[str, np.ndarray], ids: torch.Tensor):
    """Logits [windows, tokens, vocab] by transformers' own model with the given weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**source.config)
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32).eval()
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        return model(ids).logits


def calibrated_arrays(source: TinySource, calibration: Any) -> dict[str, np.ndarray]:
    """All weights of a model after calibration, as float32 in the checkpoint's own form."""
    arrays = dict(source.arrays)
    offset = 1 if source.config["model_type"] == "gemma3_text" else 0
    for name in calibration.floats:
        arrays[name] = calibration.floats[name] - (offset if name.endswith("norm.weight") else 0)
    for name in calibration.quantized:
        quantized = calibration.quantized[name]
        arrays[name] = quantized.format.dequantize(quantized)
    return arrays
