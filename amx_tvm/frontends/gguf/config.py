"""GGUF metadata to the keys of a Hugging Face ``config.json``."""

from __future__ import annotations

import difflib
import math
from typing import Any

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.frontends.gguf.architectures import (
    ARCHITECTURES,
    OPTIONAL_KEYS,
    REQUIRED_KEYS,
    GgufArchitecture,
)

# Llama 3.1 and 3.2 publish one set of values and two factors (8 and 32).
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192


def find_architecture(metadata: dict[str, Any], path: object) -> tuple[str, GgufArchitecture]:
    """Return the file's architecture name and its entry.

    Raises
    ------
    ModelError
        When the file names none, or one that is not supported.
    """
    name = metadata.get("general.architecture")
    if name in ARCHITECTURES:
        return name, ARCHITECTURES[name]
    known = ", ".join(ARCHITECTURES)
    if not isinstance(name, str):
        raise ModelError(f"{path} has no key 'general.architecture'; expected one of {known}")
    near = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.4)
    hint = f"; the nearest supported one is {near[0]!r}" if near else ""
    raise ModelError(
        f"{path} holds a model of the GGUF architecture {name!r}, which is not supported{hint} "
        f"(supported: {known})"
    )


def read_config(
    name: str,
    architecture: GgufArchitecture,
    metadata: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    rope_factors: np.ndarray | None,
    path: object,
) -> dict[str, Any]:
    """Return the configuration of a GGUF model.

    Parameters
    ----------
    name, architecture
        As :func:`find_architecture` returns them.
    metadata : dict
        The file's keys.
    shapes : dict
        Hugging Face tensor name to shape: the embedding gives the vocabulary size, and the head
        and the biases are there or not.
    rope_factors : numpy.ndarray, optional
        The tensor ``rope_freqs.weight`` [head_dim / 2], by which frequencies are divided.
    path : path-like
        The file, for messages.

    Raises
    ------
    ModelError
        When a key is missing or not one number; the message names the key.
    """
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
    }
    config.update(architecture.defaults)
    optional = {**OPTIONAL_KEYS, **architecture.keys}
    for key, field in {**REQUIRED_KEYS, **optional}.items():
        value = metadata.get(f"{name}.{key}")
        if value is None:
            if key in REQUIRED_KEYS:
                raise ModelError(f"{path} has no key '{name}.{key}'; a {name} model needs it")
        elif isinstance(value, int) and value <= 0 and key in REQUIRED_KEYS:
            raise ModelError(
                f"the key '{name}.{key}' in {path} is {value}; a positive number was expected, "
                "the file is damaged"
            )
        elif isinstance(value, (int, float)):
            config[field] = value
        else:
            raise ModelError(
                f"the key '{name}.{key}' in {path} is {value!r}; one number was expected (values "
                "that differ between layers are not supported)"
            )
    embedding = shapes.get("model.embed_tokens.weight")
    if embedding is None:
        raise ModelError(f"{path} has no tensor 'token_embd.weight'; is it a part of a model?")
    config["vocab_size"] = embedding[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in shapes
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("head_dim", config["hidden_size"] // heads)
    config.setdefault("rope_theta", 10000.0)
    config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
    rotated = metadata.get(f"{name}.rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    config["rope_scaling"] = _rope_scaling(name, config, metadata, rope_factors, path)
    for field in ("bos_token_id", "eos_token_id"):
        config[field] = metadata.get(f"tokenizer.ggml.{field}")
    if architecture.finish:
        architecture.finish(config, metadata)
    return config


def _rope_scaling(
    name: str,
    config: dict[str, Any],
    metadata: dict[str, Any],
    factors: np.ndarray | None,
    path: object,
) -> dict[str, Any] | None:
    """Return "rope_scaling" from the scaling keys or the table of frequency factors."""
    kind = metadata.get(f"{name}.rope.scaling.type", "none")
    if factors is not None:
        return _factors_to_scaling(factors, config)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{path} has the RoPE scaling {kind!r}; supported are linear and yarn")
    scaling: dict[str, Any] = {
        "rope_type": kind,
        "factor": float(metadata.get(f"{name}.rope.scaling.factor", 1.0)),
    }
    original = metadata.get(f"{name}.rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = int(original)
    return scaling


def llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """Return what "llama3" scaling divides each of the head_dim / 2 frequencies by, float64."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = LLAMA3_CONTEXT * frequencies / (2 * math.pi)
    smooth = np.clip((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _factors_to_scaling(factors: np.ndarray, config: dict[str, Any]) -> dict[str, Any]:
    """Recover the published "llama3" parameters, or keep the table itself as "longrope"."""
    factor = float(factors.max())
    expected = llama3_factors(config["head_dim"], config["rope_theta"], factor)
    if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": LLAMA3_HIGH,
            "original_max_position_embeddings": LLAMA3_CONTEXT,
        }
    table = [float(value) for value in factors]
    return {
        "rope_type": "longrope",
        "short_factor": table,
        "long_factor": table,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }
