"""Reading and normalizing ``config.json``: one shape of dictionary whatever wrote it.

* ``rope_parameters`` (transformers 5) becomes ``rope_theta`` and ``rope_scaling``.
* ``tie_word_embeddings`` says what the weights say where the configuration is silent.
* ``eos_token_id`` becomes a list, in the generation configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from amx_tvm.errors import ModelError
from amx_tvm.frontends.fields import Token, check_fields, without_nulls
from amx_tvm.frontends.hf.parts import with_parts
from amx_tvm.frontends.hf.quantized_checkpoint import reads
from amx_tvm.frontends.hf.quantized_layouts import Quantization
from amx_tvm.schema import Mismatch, conform
from amx_tvm.strict_json import read_json as read_value

# What every decoder needs, with the name that GPT-2 type configurations use.
REQUIRED = (
    ("vocab_size",),
    ("hidden_size", "n_embd"),
    ("num_hidden_layers", "n_layer"),
    ("num_attention_heads", "n_head"),
)

_ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")  # not of one kind of scaling


class Generation(TypedDict, total=False):
    """The fields of ``generation_config.json`` that are read; every one may be null."""

    bos_token_id: Token
    eos_token_id: Token | list[Token]
    pad_token_id: Token


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """Return a JSON object from a file; an empty dictionary for an optional file that is missing.

    Raises
    ------
    ModelError
        When the file is missing, no JSON within bounds, or no object.
    """
    try:
        value = read_value(path, ModelError)
    except FileNotFoundError:
        if optional:
            return {}
        raise ModelError(f"{path} does not exist; it is part of a Hugging Face model") from None
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
    config = check_fields(with_parts(read_json(path), directory), path)
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
        described = own.get("quantization")
        if isinstance(described, dict) and described.get("quant_algo"):
            config["quantization_config"] = {"quant_method": "modelopt", **described}
    quantization = config.get("quantization_config") or {}
    try:
        conform(Quantization, without_nulls(conform(dict[str, Any], quantization)))
    except Mismatch as problem:
        raise ModelError(f"{path}: quantization_config: {problem}") from None
    if config.get("quantization_config") and not reads(config["quantization_config"]):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise ModelError(
            f"{path} describes weights that are already quantized by {method}; expected bf16, "
            "fp16 or fp32 weights (the unquantized checkpoint), or one of amx-tvm quantize, "
            "compressed-tensors (mxfp4-pack-quantized, nvfp4-pack-quantized), modelopt (NVFP4), "
            "gpt-oss (mxfp4) or torchao (MXTensor, NVFP4Tensor)"
        )
    return check_fields(normalize(config), path)


def normalize(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with the RoPE fields of older configurations (see the module's docstring).

    As in transformers, ``rope_scaling`` goes before ``rope_parameters``, and what stands inside
    goes before fields of the same name beside it.
    """
    config = dict(config)
    parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling")
    if isinstance(parameters, dict) and isinstance(parameters.get("full_attention"), dict):
        # Gemma 3 nests one dictionary per kind of layer.
        local = parameters.get("sliding_attention") or {}
        if local.get("rope_theta") is not None:
            config["rope_local_base_freq"] = local["rope_theta"]
        scaling = {**parameters["full_attention"], **(scaling or {})}
    scaling = scaling or parameters
    if isinstance(scaling, dict):
        inside = {name: value for name, value in scaling.items() if name in _ROPE_FIELDS}
        config |= {name: value for name, value in inside.items() if value is not None}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        rest = {name: value for name, value in scaling.items() if name not in inside}
        config["rope_scaling"] = rest if kind != "default" else None
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
    path = directory / "generation_config.json"
    generation = read_json(path, optional=True)
    try:
        generation |= conform(Generation, without_nulls(generation))
    except Mismatch as problem:
        raise ModelError(f"{path}: the field {problem}") from None
    for key in ("bos_token_id", "pad_token_id"):
        if generation.get(key) is None:
            generation[key] = config.get(key)
    both = token_ids(generation.get("eos_token_id")) + token_ids(config.get("eos_token_id"))
    generation["eos_token_id"] = list(dict.fromkeys(both))
    return generation
