"""Configurations of models in several parts: a decoder beside what sees.

The decoder's fields stand in ``text_config`` and what prepares images in files of their own; here
they become one configuration, in which the decoder's fields are where a text model has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amx_tvm.errors import ModelError
from amx_tvm.strict_json import read_json as read_value

FILES = ("preprocessor_config.json", "processor_config.json")
PROCESSOR = "image_processor"
_LLAMA = {  # what transformers has where a configuration says nothing
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


def with_parts(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return a configuration with the fields of its decoder, and what prepares images.

    Parameters
    ----------
    config : dict
        What config.json says.
    directory : Path
        Where the files of the processor are.
    """
    text = config.get("text_config")
    if not isinstance(text, dict) or not isinstance(config.get("vision_config"), dict):
        return config
    text = {**(_LLAMA if text.get("model_type") == "llama" else {}), **without_none(text)}
    whole = {**text, **without_none(config)}
    # Either may say so, and the weights have the last word.
    parts = (text, config)
    whole["tie_word_embeddings"] = any(part.get("tie_word_embeddings") for part in parts)
    return {**whole, PROCESSOR: _processor(directory)}


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that say something."""
    return {key: value for key, value in values.items() if value is not None}


def _processor(directory: Path) -> dict[str, Any] | None:
    """Return what prepares images, of the file that says it."""
    for file in FILES:
        try:
            found = read_value(directory / file, ModelError)
        except FileNotFoundError:
            continue
        if isinstance(found, dict) and isinstance(found.get(PROCESSOR), dict):
            found = found[PROCESSOR]
        if isinstance(found, dict) and "image_mean" in found:
            return found
    return None
