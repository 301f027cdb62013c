"""The tokenizer of an artifact, and how a prompt becomes token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amx_tvm.errors import ArtifactError, GenerationError
from amx_tvm.runtime import options

_LONG_TEXT = 1 << 14  # characters


def load_tokenizer(artifact: Path) -> Any:
    """Return an artifact's tokenizer, a `tokenizers.Tokenizer`.

    Raises
    ------
    ArtifactError
        It has none, it is damaged, or the package that reads it is missing.
    """
    file = artifact / "tokenizer.json"
    if not file.is_file():
        raise ArtifactError(
            f"{artifact} has no tokenizer.json, so it takes and returns token ids only"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ArtifactError(
            "text needs the package `tokenizers`, which is not installed here (`pip install "
            "tokenizers`); give and take token ids instead, or use the C++ runner"
        ) from None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing else
        raise ArtifactError(f"{file} is no tokenizer that can be read: {error}") from None


def encode(tokenizer: Any, text: str, prefix: list[int]) -> list[int]:
    """Return the token ids of a prompt, with ``prefix`` in front where it is not there already.

    Raises
    ------
    GenerationError
        As `Engine.encode`.
    """
    options.text("the prompt", text)
    try:
        if len(text) < _LONG_TEXT:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        else:  # without offsets, and other threads go on meanwhile
            [found] = tokenizer.encode_batch_fast([text], add_special_tokens=False)
            ids = found.ids
    except Exception as error:  # the library raises nothing else
        raise GenerationError(
            f"the model's tokenizer cannot encode the prompt: {error}; give token ids, or "
            "other words"
        ) from None
    return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]
