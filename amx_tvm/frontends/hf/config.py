"""Reading and normalizing ``config.json``: one shape of dictionary whatever wrote it.

* ``rope_parameters`` (transformers 5) becomes ``rope_theta`` and ``rope_scaling``.
* ``tie_word_embeddings`` says what the weights say where the configuration is silent.
* ``eos_token_id`` becomes a list, in the generation configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from amx_tvm.errors import ModelError
from amx_tvm.frontends.hf.quantized_checkpoint import reads

# What every decoder needs, with the name that GPT-2 type configurations use.
REQUIRED = (
    ("vocab_size",),
    ("hidden_size", "n_embd"),
    ("num_hidden_layers", "n_layer"),
    ("num_attention_heads", "n_head"),
)


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """Return a JSON object from a file; an empty dictionary for an optional file that is missing.

    Raises
    ------
    ModelError
        When the file is missing, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise ModelError(f"{path} does not exist; it is part of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}; an object was expected")
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """Return the normalized ``config.json`` of a directory.

    Raises
    ------
    ModelError
        When the file is missing or damaged, names no architecture, or a causal language model
        lacks a field; the message names the field.
    """
    path = directory / "config.json"
    config = read_json(path)
    architectures = config.get("architectures") or []
    if not architectures and not config.get("model_type"):
        raise ModelError(f"{path} has neither 'architectures' nor 'model_type'; expected one")
    if not architectures or any("ForCausalLM" in str(name) for name in architectures):
        for aliases in REQUIRED:
            if all(config.get(alias) is None for alias in aliases):
                raise ModelError(f"{path} has no field {aliases[0]!r}; a decoder model needs it")
    if not config.get("quantization_config"):
        # ModelOpt's older exports describe themselves in a file of their own.
        own = read_json(directory / "hf_quant_config.json", optional=True)
        if own.get("quantization", {}).get("quant_algo"):
            config["quantization_config"] = {"quant_method": "modelopt", **own["quantization"]}
    if config.get("quantization_config") and not reads(config["quantization_config"]):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise ModelError(
            f"{path} describes weights that are already quantized by {method}; expected bf16, "
            "fp16 or fp32 weights (the unquantized checkpoint), or one of amx-tvm quantize, "
            "compressed-tensors (mxfp4-pack-quantized, nvfp4-pack-quantized), modelopt (NVFP4), "
            "gpt-oss (mxfp4) or torchao (MXTensor, NVFP4Tensor)"
        )
    return normalize(config)


def normalize(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with the RoPE fields of older configurations (see the module's docstring)."""
    config = dict(config)
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        # Gemma 3 nests one dictionary per kind of layer.
        if isinstance(parameters.get("full_attention"), dict):
            local = parameters.get("sliding_attention") or {}
            config.setdefault("rope_local_base_freq", local.get("rope_theta"))
            parameters = parameters["full_attention"]
        if parameters.get("rope_theta") is not None:
            config.setdefault("rope_theta", parameters["rope_theta"])
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        if scaling.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", scaling)
    config.setdefault("rope_scaling", None)
    return config


def token_ids(value: Any) -> list[int]:
    """Return the token ids of a field that is null, one id or a list of ids."""
    if value is None:
        return []
    return [int(item) for item in (value if isinstance(value, list) else [value])]


def read_generation_config(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return ``generation_config.json``, completed from the config.

    "eos_token_id" is a list, of what either of the two names: fine-tuned models often change one.
    """
    generation = read_json(directory / "generation_config.json", optional=True)
    for key in ("bos_token_id", "pad_token_id"):
        if generation.get(key) is None:
            generation[key] = config.get(key)
    both = token_ids(generation.get("eos_token_id")) + token_ids(config.get("eos_token_id"))
    generation["eos_token_id"] = list(dict.fromkeys(both))
    return generation
