"""The tokenizer files of an artifact: tokenizer.json, and tokenizer_config.json in one shape.

Whatever the model ships, the configuration that is written has ``bos_token``, ``eos_token``,
``unk_token`` and ``pad_token`` as text or null, ``add_bos_token`` and ``add_eos_token`` as
booleans, and the default ``chat_template`` as text where there is one. Who encodes a prompt calls
``encode(text, add_special_tokens=False)`` and puts BOS in front where ``add_bos_token`` says so:
tokenizer.json's own post-processor must not add it a second time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from amx_tvm.errors import ModelError
from amx_tvm.frontends.hf.config import read_config, read_generation_config, read_json

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def write_tokenizer_files(directory: Path, tokenizer: str, config: dict[str, Any]) -> list[str]:
    """Write both files; ``tokenizer`` is the JSON text. Returns their names."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8")
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    return [TOKENIZER_FILE, CONFIG_FILE]


def copy_tokenizer(source: Path, directory: Path) -> list[str]:
    """Copy the tokenizer of a Hugging Face directory into an artifact.

    Parameters
    ----------
    source : Path
        The model's directory: tokenizer.json, and where they exist tokenizer_config.json,
        chat_template.jinja, generation_config.json.
    directory : Path
        Where the files go.

    Returns
    -------
    list of str
        Names of the written files.

    Raises
    ------
    ModelError
        When tokenizer.json is missing or the library cannot read it.
    """
    tokenizer, config = _read(source)
    template = _chat_template(source, config)
    config.pop("chat_template", None)
    if template:
        config["chat_template"] = template
    text = (source / TOKENIZER_FILE).read_text(encoding="utf-8")
    return write_tokenizer_files(directory, text, config)


def adds_bos(source: Path) -> bool:
    """Return whether the tokenizer of a Hugging Face directory starts a text with BOS.

    A directory without a tokenizer adds nothing.
    """
    return (source / TOKENIZER_FILE).is_file() and _read(source)[1]["add_bos_token"]


def _read(source: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer and its completed configuration."""
    path = source / TOKENIZER_FILE
    if not path.is_file():
        raise ModelError(
            f"{source} has no {TOKENIZER_FILE}; expected the fast tokenizer's file (make it with "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        reason = " ".join(str(error).split())
        raise ModelError(f"{path} is no tokenizer that can be read: {reason}") from None
    config = read_json(source / CONFIG_FILE, optional=True)
    for key in SPECIAL_TOKENS:
        config[key] = _token_text(config.get(key))
    _fill_from_ids(config, source, tokenizer)
    for key in ("bos", "eos"):
        if not isinstance(config.get(f"add_{key}_token"), bool):
            token = config[f"{key}_token"]
            config[f"add_{key}_token"] = _adds(tokenizer, token, last=key == "eos")
    return tokenizer, config


def _token_text(value: Any) -> str | None:
    """Return the text of a special token, which may be stored as an AddedToken object."""
    return value.get("content") if isinstance(value, dict) else value


def _fill_from_ids(config: dict[str, Any], source: Path, tokenizer: Tokenizer) -> None:
    """Complete BOS and EOS from the ids of the model's configuration."""
    ids = read_generation_config(source, read_config(source))
    for key, index in (
        ("bos", ids["bos_token_id"]),
        ("eos", next(iter(ids["eos_token_id"]), None)),
    ):
        if config[f"{key}_token"] is None and index is not None:
            config[f"{key}_token"] = tokenizer.id_to_token(int(index))


def _adds(tokenizer: Tokenizer, token: str | None, last: bool) -> bool:
    """Find out whether the post-processor puts ``token`` in front of or behind a text."""
    if token is None:
        return False
    tokens = tokenizer.encode("a", add_special_tokens=True).tokens
    return bool(tokens) and tokens[-1 if last else 0] == token


def _chat_template(source: Path, config: dict[str, Any]) -> str | None:
    """Return the default chat template, from its own file or from the configuration."""
    file = source / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    template = template or read_json(source / "chat_template.json", optional=True).get(
        "chat_template"
    )
    if isinstance(template, list):  # several templates with names
        named = {entry.get("name"): entry.get("template") for entry in template}
        return named.get("default") or next(iter(named.values()), None)
    return template
