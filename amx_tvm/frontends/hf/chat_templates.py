"""The chat templates of a Hugging Face directory, wherever they lie.

chat_template.jinja and additional_chat_templates/NAME.jinja win over tokenizer_config.json, as in
transformers; chat_template.json is what processors of older versions write.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amx_tvm.errors import ModelError
from amx_tvm.frontends.hf.config import read_json
from amx_tvm.strict_json import read_text

DEFAULT = "default"


def read_chat_templates(directory: Path, config: Mapping[str, Any]) -> str | list[dict] | None:
    """Return the template's text, a list of {"name", "template"} where there are several, or None.

    Raises
    ------
    ModelError
        For a file that is no UTF-8 text, or templates that are no text.
    """
    named = {}
    for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        named[file.stem] = read_text(file, ModelError)
    if (directory / "chat_template.jinja").is_file():
        named[DEFAULT] = read_text(directory / "chat_template.jinja", ModelError)
    stored = config.get("chat_template")
    if not named and not stored:
        stored = read_json(directory / "chat_template.json", optional=True).get("chat_template")
    if not named and stored:
        named = _named(stored, directory)
    if not named:
        return None
    if list(named) == [DEFAULT]:
        return named[DEFAULT]
    return [{"name": name, "template": named[name]} for name in sorted(named)]


def _named(stored: Any, directory: Path) -> dict[str, str]:
    """Return templates by name, of a configuration's text, dictionary or list of objects."""
    if isinstance(stored, list):
        entries = [entry for entry in stored if isinstance(entry, dict)]
        pairs: list[Any] = [(entry.get("name"), entry.get("template")) for entry in entries]
    else:
        pairs = list(stored.items()) if isinstance(stored, dict) else [(DEFAULT, stored)]
    if not all(isinstance(item, str) for pair in pairs for item in pair):
        raise ModelError(
            f"a chat template in {directory} is no text; expected a text, or a list of objects "
            "with 'name' and 'template'"
        )
    return dict(pairs)
