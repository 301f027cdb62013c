"""The token list of a GGUF file: texts, types and special ids, as llama.cpp reads them.

Files from the wild have holes, which are mended where one reading is certain:

* an end-of-turn token, or one that looks like ``<|im_start|>``, that is marked as a normal token is
  a control token (llama.cpp does so for the ends of turns and warns);
* of two tokens with the same text the last one is what the text encodes to, as in transformers
  (llama.cpp refuses the file); the other one decodes to the text, but no text becomes it;
* a token that is no UTF-8 decodes to U+FFFD, and no text becomes it;
* an end that the file declares and that looks like a tag is a control token too;
* an unused token decodes to nothing, and no text becomes it;
* an empty text is ``[EMPTY_n]``.

A special id that is no token is refused by the name of its key; llama.cpp warns and goes on with a
default that may be any token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.frontends.gguf.pretokenizers import find_kind
from amx_tvm.frontends.model_tokenizer import END_TEXTS, end_ids
from amx_tvm.schema import Mismatch, conform

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
SPECIAL_KEYS = ("bos", "eos", "eot", "eom", "unknown", "padding")
# Where the file is silent; llama.cpp also says 11 for gpt2's BOS and EOS, which only Falcon has.
_DEFAULT_IDS = {SENTENCEPIECE: {"bos": 1, "eos": 2, "unknown": 0}}

# Sum of the squares of the tokens' lengths: so much their cuts in two take. 262 144 tokens of ten
# characters have 2^25.
MOST_WORK = 1 << 28

# "No token", as an int32 and as a uint32.
_NULL = (-1, 2**32 - 1)

# Behind a text: "not this one", and "not at all". They are no characters of any text; decoders
# remove the one, and with the other all that stands in front of it.
SHADOWED, HIDDEN = "\U0010ffff", "\U0010fffe"

_LOOKS_LIKE_CONTROL = re.compile(r"<[|｜][^\s|｜<>]+[|｜]>")
_LOOKS_LIKE_TAG = re.compile(r"<.+>|\[.+\]")
_SURROGATES = re.compile("[\ud800-\udfff]")

Metadata = dict[str, Any]

# What keys of vocabularies hold; ids are checked one by one.
Keys = TypedDict(
    "Keys",
    {
        "tokenizer.ggml.model": str,
        "tokenizer.ggml.pre": str,
        "tokenizer.ggml.merges": list,
        "tokenizer.ggml.token_type": np.ndarray,
        "tokenizer.ggml.scores": np.ndarray,
        "tokenizer.ggml.add_bos_token": bool,
        "tokenizer.ggml.add_eos_token": bool,
        "tokenizer.ggml.add_space_prefix": bool,
        "tokenizer.ggml.bos_token_id": int,
        "tokenizer.ggml.eos_token_id": int,
        "tokenizer.ggml.eot_token_id": int,
        "tokenizer.ggml.eom_token_id": int,
        "tokenizer.ggml.unknown_token_id": int,
        "tokenizer.ggml.padding_token_id": int,
    },
    total=False,
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a GGUF file.

    Attributes
    ----------
    metadata : dict
        The file's keys, of which those under ``tokenizer.ggml`` are read.
    texts : list of str
        What every token looks like; the same text may stand there twice.
    kinds : np.ndarray
        ``tokenizer.ggml.token_type`` [tokens], int32, corrected as the module's docstring says.
    special : dict of str to int
        Ids by the names of ``SPECIAL_KEYS``; those that the model lacks are missing.
    """

    metadata: Metadata
    texts: list[str]
    kinds: np.ndarray
    special: dict[str, int]

    @classmethod
    def read(cls, metadata: Metadata, path: object) -> Vocabulary:
        """Return the vocabulary of a file's keys; ``path`` names the file in messages.

        Raises
        ------
        ModelError
            When there is none, types and tokens do not fit, or a special id is no token.
        """
        stored = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(stored, list) or not stored:
            raise ModelError(f"{path} has no key 'tokenizer.ggml.tokens': it carries no vocabulary")
        try:
            conform(Keys, metadata)
        except Mismatch as problem:
            raise ModelError(f"{path}: the key {problem}") from None
        if sum(len(text) ** 2 for text in stored) > MOST_WORK:
            raise ModelError(f"{path} has tokens longer than any vocabulary's; the file is damaged")
        texts = [text or f"[EMPTY_{index}]" for index, text in enumerate(stored)]
        kinds = metadata.get("tokenizer.ggml.token_type")
        kinds = np.ones(len(texts), np.int32) if kinds is None else np.array(kinds, np.int32)
        if len(kinds) != len(texts):
            raise ModelError(f"{path} has {len(texts)} tokens, but {len(kinds)} token types")
        for index in np.flatnonzero((kinds == NORMAL) | (kinds == USER_DEFINED)):
            text = texts[index]
            marked_normal = kinds[index] == NORMAL and _LOOKS_LIKE_CONTROL.fullmatch(text)
            if text in END_TEXTS or marked_normal:
                kinds[index] = CONTROL
        special = _special_ids(metadata, len(texts), path)
        for key in {"eos", "eot", "eom"} & special.keys():
            if _LOOKS_LIKE_TAG.fullmatch(texts[special[key]]):
                kinds[special[key]] = CONTROL
        return cls(metadata, texts, kinds, special)

    @cached_property
    def names(self) -> list[str]:
        """One text for each token that no other token has; see ``SHADOWED`` and ``HIDDEN``."""
        last = {text: index for index, text in enumerate(self.texts)}
        merged = self._merged() if (self.kinds == UNUSED).any() else set()
        names, taken = [], set(last)
        for index, (text, kind) in enumerate(zip(self.texts, self.kinds, strict=True)):
            name = _SURROGATES.sub("\ufffd", text)
            if kind == UNUSED and text not in merged:
                name += HIDDEN
            elif name != text or last[text] != index:
                name += SHADOWED
            while name != text and name in taken:
                name += name[-1]
            taken.add(name)
            names.append(name)
        return names

    def _merged(self) -> set[str]:
        """Return the texts that a merge joins or makes; the library needs them as they are."""
        pairs = [merge.split(" ", 1) for merge in self.metadata.get("tokenizer.ggml.merges", [])]
        return {text for pair in pairs for text in (*pair, "".join(pair))}

    def marked(self, mark: str) -> bool:
        """Return whether there are tokens with the mark ``SHADOWED`` or ``HIDDEN``."""
        return any(name.endswith(mark) for name in self.names)

    def text_of(self, key: str) -> str | None:
        """Return the text of a special token, by the names of ``SPECIAL_KEYS``."""
        return self.texts[self.special[key]] if key in self.special else None

    def adds(self, key: str) -> bool:
        """Return whether a text gets a BOS or EOS token (``key`` "bos" or "eos")."""
        if key not in self.special:
            return False
        declared = self.metadata.get(f"tokenizer.ggml.add_{key}_token")
        if declared is not None:
            return bool(declared)
        if key == "eos":
            return False
        if self.metadata.get("tokenizer.ggml.model") == SENTENCEPIECE:
            return True
        return find_kind(self.metadata.get("tokenizer.ggml.pre", "default")).add_bos

    def end_ids(self) -> list[int]:
        """Return the ids of all tokens that end a generation, the declared EOS first."""
        declared = [self.special[key] for key in ("eos", "eot", "eom") if key in self.special]
        return end_ids(declared, {text: index for index, text in enumerate(self.texts)})

    def generation_config(self) -> dict[str, Any]:
        """Return what :class:`ModelSource` calls so."""
        return {
            "bos_token_id": self.special.get("bos"),
            "eos_token_id": self.end_ids(),
            "pad_token_id": self.special.get("padding"),
            "prompt_prefix": [self.special["bos"]] if self.adds("bos") else [],
        }


def _special_ids(metadata: Metadata, count: int, path: object) -> dict[str, int]:
    """Return the ids of the special tokens, checked against the number of tokens."""
    defaults = _DEFAULT_IDS.get(metadata.get("tokenizer.ggml.model", ""), {})
    found = {key: index for key, index in defaults.items() if index < count}
    for key in SPECIAL_KEYS:
        name = f"tokenizer.ggml.{key}_token_id"
        index = metadata.get(name)
        if index is None:
            continue
        if index in _NULL:
            found.pop(key, None)
            continue
        if not 0 <= index < count:
            raise ModelError(
                f"{path} has {index!r} as {name!r}, but its {count} tokens have the ids 0 to "
                f"{count - 1}; correct the key or convert the model again"
            )
        found[key] = index
    return found
