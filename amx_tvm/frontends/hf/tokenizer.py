"""The tokenizer of a Hugging Face directory, read as transformers 5 reads it.

Tokens and flags can stand in tokenizer.json, tokenizer_config.json (``added_tokens_decoder``, the
named special tokens, ``extra_special_tokens``), special_tokens_map.json and added_tokens.json; all
of them together make the tokenizer. Its ids equal those of ``AutoTokenizer``:

* truncation and padding in tokenizer.json are the state of a training run and are dropped;
* only tokenizer.json's post-processor says what surrounds a text: beside such a file
  ``add_bos_token`` and ``add_eos_token`` of the configuration are not read;
* special_tokens_map.json and added_tokens.json are read only without ``added_tokens_decoder``;
* a token that tokenizer.json lacks gets the next free id, whatever id the configuration gives it.

One thing is not followed: for the classes of byte-level families transformers builds the
pre-tokenizer anew and drops tokens that ``added_tokens_decoder`` does not list; here tokenizer.json
keeps its word, as in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers

from amx_tvm.errors import ModelError
from amx_tvm.frontends.hf.chat_templates import read_chat_templates
from amx_tvm.frontends.hf.config import read_config, read_generation_config, read_json
from amx_tvm.frontends.model_tokenizer import (
    CONFIG_FILE,
    SPECIAL_TOKENS,
    TOKENIZER_FILE,
    ModelTokenizer,
)
from amx_tvm.frontends.tokenizer_limits import MOST_BYTES, guarded, load_tokenizer
from amx_tvm.strict_json import read_text

NAMED_TOKENS = (*SPECIAL_TOKENS[:3], "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds the file of a fast tokenizer."""
    return (directory / TOKENIZER_FILE).is_file()


def read_tokenizer(directory: Path) -> ModelTokenizer:
    """Read the tokenizer of a Hugging Face directory.

    Parameters
    ----------
    directory : Path
        With tokenizer.json, and where they exist the other files that the module's docstring
        names, generation_config.json and chat templates.

    Raises
    ------
    ModelError
        When tokenizer.json is missing or the library cannot read it, or a file is damaged.
    """
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        raise ModelError(
            f"{directory} has no {TOKENIZER_FILE}; expected the fast tokenizer's file (make it "
            "with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers)"
        )
    tokenizer = load_tokenizer(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = read_json(directory / CONFIG_FILE, optional=True)
    legacy = not isinstance(config.get("added_tokens_decoder"), dict)
    if legacy:
        config.update(read_json(directory / "special_tokens_map.json", optional=True))
    model = read_config(directory)
    name = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "")
    # Of the model types that ship this class all but llama have a class of their own; byte-level
    # vocabularies under its name are read as they are.
    if name.removesuffix("Fast") == "LlamaTokenizer" and model.get("model_type") == "llama":
        if '"ByteLevel"' not in read_text(path, ModelError, MOST_BYTES):
            _as_llama_tokenizer(tokenizer, config)
    guarded(
        lambda: _add_tokens(tokenizer, config, directory, legacy),
        f"the added tokens in {directory / CONFIG_FILE} and the files beside it cannot be read",
    )
    for key in SPECIAL_TOKENS:
        config[key] = _text(config.get(key))
        if not isinstance(config[key], str | None):
            raise ModelError(f"{directory / CONFIG_FILE}: {key} is no text")
    _fill_from_ids(config, directory, tokenizer)
    templates = read_chat_templates(directory, config)
    config.pop("chat_template", None)
    if templates:
        config["chat_template"] = templates
    return ModelTokenizer(tokenizer, config)


def _add_tokens(
    tokenizer: Tokenizer, config: Mapping[str, Any], directory: Path, legacy: bool
) -> None:
    """Add the tokens that other files than tokenizer.json list."""
    present = list(tokenizer.get_added_tokens_decoder().values())
    special = [_token(value, special=True) for value in _special_values(config)]
    if legacy:
        names = {token.content for token in special}
        listed = read_json(directory / "added_tokens.json", optional=True)
        declared = {
            int(index): AddedToken(text, special=text in names) for text, index in listed.items()
        }
    else:
        entries = config["added_tokens_decoder"].items()
        declared = {int(index): _token(value) for index, value in entries}
    # A token whose flags differ is given again: the library then takes the new flags.
    known = {repr(token) for token in present}
    new = [declared[index] for index in sorted(declared) if repr(declared[index]) not in known]
    texts = {token.content for token in [*present, *new]}
    for token in special:
        if token.content not in texts:
            texts.add(token.content)
            new.append(token)
    tokenizer.add_tokens(new)


def _special_values(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the special tokens of a configuration, named ones first."""
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    names = [key for key in config if key.endswith("_token") and key not in NAMED_TOKENS]
    for key in (*NAMED_TOKENS, *names):
        if isinstance(config.get(key), str | dict):
            yield config[key]
    more = more.values() if isinstance(more, dict) else more
    yield from (value for value in more if value is not None)


def _token(value: Any, special: bool = False) -> AddedToken:
    """Return a token that a file gives as text or as an object."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    flags = {key: bool(value[key]) for key in _FLAGS if value.get(key) is not None}
    return AddedToken(value["content"], **{**flags, **({"special": True} if special else {})})


def _text(value: Any) -> str | None:
    """Return the text of a special token, which may be stored as an object."""
    return value.get("content") if isinstance(value, dict) else value


def _as_llama_tokenizer(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Cut the text of a sentencepiece vocabulary as transformers' LlamaTokenizer does.

    The class does not take over tokenizer.json's normalizer, which puts a space in front of every
    stretch of text: it leaves out the space where the text begins with one, and, unless ``legacy``
    is set, behind special tokens. llama.cpp and sentencepiece itself put it there always.
    """
    prefix = config.get("add_prefix_space") in (None, True)
    scheme = "always" if config.get("legacy") else "first"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=scheme if prefix else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def _fill_from_ids(config: dict[str, Any], directory: Path, tokenizer: Tokenizer) -> None:
    """Complete BOS and EOS from the ids of the model's configuration."""
    ids = read_generation_config(directory, read_config(directory))
    for key, index in (
        ("bos", ids["bos_token_id"]),
        ("eos", next(iter(ids["eos_token_id"]), None)),
    ):
        if config[f"{key}_token"] is None and index is not None and 0 <= index < 2**32:
            config[f"{key}_token"] = tokenizer.id_to_token(index)
