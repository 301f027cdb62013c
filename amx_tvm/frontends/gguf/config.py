"""GGUF metadata to the keys of a Hugging Face ``config.json``."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.frontends.fields import check_fields
from amx_tvm.frontends.gguf.architectures import ARCHITECTURES, GgufArchitecture
from amx_tvm.frontends.gguf.keys import ModelKeys
from amx_tvm.frontends.gguf.rope import read_rope_scaling

FULL, SLIDING = "full_attention", "sliding_attention"


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
    rope_factors: dict[str, np.ndarray],
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
        Hugging Face tensor name to shape: the embedding gives the vocabulary size, and the head is
        there or not.
    rope_factors : dict of str to numpy.ndarray
        The tensors by which frequencies are divided, [rotary / 2]: "rope_freqs", or
        "rope_factors_long" and "rope_factors_short".
    path : path-like
        The file, for messages.

    Raises
    ------
    ModelError
        When a key is missing, not one number, or not known; the message names the key.
    """
    keys = ModelKeys(name, metadata, path)
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **architecture.defaults,
    }
    for key, field in architecture.required.items():
        keys.require(key)
        config[field] = keys.field(key, field)
    for key, field in architecture.optional.items():
        value = keys.field(key, field)
        if value is not None:
            config[field] = value
    embedding = shapes.get("model.embed_tokens.weight")
    if embedding is None:
        raise ModelError(f"{path} has no tensor 'token_embd.weight'; is it a part of a model?")
    config["vocab_size"] = embedding[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in shapes
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("head_dim", config["hidden_size"] // heads)
    if config["head_dim"] <= 0:
        raise ModelError(
            f"{path} has {heads} heads for {config['hidden_size']} channels; the file is damaged"
        )
    config.setdefault("rope_theta", 10000.0)
    keys.equal("attention.value_length", config["head_dim"])
    rotated = keys.number("rope.dimension_count", config["head_dim"])
    if rotated not in range(2, config["head_dim"] + 1, 2) and architecture.rotates:
        raise ModelError(
            f"{path} has {heads} heads ('{name}.attention.head_count') of {config['head_dim']} "
            f"channels ('{name}.embedding_length', '{name}.attention.key_length'), of which "
            f"{rotated} rotate ('{name}.rope.dimension_count'); an even number of them was expected"
        )
    if rotated != config["head_dim"] and architecture.rotates:
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    config["rope_scaling"] = read_rope_scaling(keys, config, rotated, rope_factors)
    if "sliding_window" in config:
        _read_layer_types(keys, config)
    for field in ("bos_token_id", "eos_token_id"):
        config[field] = metadata.get(f"tokenizer.ggml.{field}")
    if architecture.finish:
        architecture.finish(config, keys)
    config = check_fields(config, path)
    keys.equal("attention.scale", _attention_scale(config))
    keys.check_all_read()
    experts = [stored for stored in shapes if ".experts." in stored]
    if experts and not config.get("num_experts_per_tok"):
        raise ModelError(
            f"{path} holds the experts' tensor {experts[0]!r}, but the key '{name}.expert_count' "
            "names no experts"
        )
    return config


def _read_layer_types(keys: ModelKeys, config: dict[str, Any]) -> None:
    """Read which layers slide: a flag a layer, or a period whose last layer sees everything."""
    pattern = keys.get("attention.sliding_window_pattern")
    if pattern is None:
        return
    layers = range(config["num_hidden_layers"])
    if isinstance(pattern, np.ndarray) and len(pattern) >= len(layers):
        slides = [bool(pattern[layer]) for layer in layers]
    elif not isinstance(pattern, int) or pattern < 0:
        raise ModelError(
            f"the key '{keys.name}.attention.sliding_window_pattern' in {keys.path} is neither a "
            f"period nor a flag for each of the {len(layers)} layers"
        )
    else:
        slides = [pattern == 0 or layer % pattern < pattern - 1 for layer in layers]
    config["layer_types"] = [SLIDING if slide else FULL for slide in slides]


def _attention_scale(config: dict[str, Any]) -> float:
    if "attention_multiplier" in config:
        return config["attention_multiplier"]
    return float(config.get("query_pre_attn_scalar", config["head_dim"])) ** -0.5
