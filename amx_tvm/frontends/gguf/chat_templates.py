"""The chat templates of a GGUF file: ``tokenizer.chat_template`` and named ones beside it."""

from __future__ import annotations

from typing import Any

from amx_tvm.errors import ModelError

KEY = "tokenizer.chat_template"


def chat_templates(metadata: dict[str, Any], path: object) -> str | list[dict[str, str]] | None:
    """Return the template's text, a list of {"name", "template"} where there are several, or None.

    Named ones are the keys ``tokenizer.chat_template.NAME``.

    Raises
    ------
    ModelError
        When a template is no text.
    """
    named = {
        key.removeprefix(KEY).lstrip(".") or "default": value
        for key, value in metadata.items()
        if key == KEY or key.startswith(f"{KEY}.")
    }
    named = {name: value for name, value in named.items() if value != ""}
    for name, value in named.items():
        if not isinstance(value, str):
            raise ModelError(f"the chat template {name!r} in {path} is no text")
    if list(named) == ["default"]:
        return named["default"]
    return [{"name": name, "template": named[name]} for name in sorted(named)] or None
