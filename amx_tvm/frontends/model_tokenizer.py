"""A model's tokenizer as an artifact keeps it, and what it says about prompts and their ends.

Whatever the model ships, an artifact gets two files. tokenizer.json holds everything that turns
text into ids and back, the tokens that other files of the model add included; it has no state of a
training run. tokenizer_config.json has ``bos_token``, ``eos_token``, ``unk_token`` and
``pad_token`` as text or null, ``add_bos_token`` and ``add_eos_token`` as booleans, and
``chat_template`` where there is one: a text, or a list of {"name", "template"}.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from amx_tvm.frontends.tokenizer_limits import guarded

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

# Tokens that end a turn or a text in the known families, by their text: a base model's
# configuration names its own EOS only, and GGUF has room for one. llama.cpp also stops at the
# separators of fill-in-the-middle and at "</s>" wherever it is a token; transformers does not, and
# code models write such separators in the middle of their text.
END_TEXTS = frozenset(
    {
        "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
        "<end_of_turn>", "<turn|>", "<|tool_response>", "<|end|>", "<|return|>", "<|call|>",
        "<eos>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>", "<｜end▁of▁sentence｜>",
    }
)  # fmt: skip


def end_ids(declared: Iterable[int], vocabulary: Mapping[str, int]) -> list[int]:
    """Return the ids of all tokens that end a generation.

    Parameters
    ----------
    declared : iterable of int
        What the model's own files name; these come first, in their order.
    vocabulary : mapping of str to int
        The text of every token.
    """
    texts = END_TEXTS & vocabulary.keys()
    if {"<|return|>", "<|call|>"} <= texts:
        texts -= {"<|end|>"}  # in the harmony format it ends a message, and the turn goes on
    return list(dict.fromkeys([*declared, *sorted(vocabulary[text] for text in texts)]))


@dataclass(frozen=True)
class ModelTokenizer:
    """A tokenizer with its configuration.

    Attributes
    ----------
    tokenizer : Tokenizer
        Complete: all added tokens, the model's post-processor.
    config : dict
        The content of tokenizer_config.json in the shape that the module's docstring gives.
    """

    tokenizer: Tokenizer
    config: dict[str, Any]

    @cached_property
    def prefix(self) -> list[int]:
        """The ids that the post-processor puts in front of a text, most often BOS or none."""
        return self._surroundings()[0]

    @cached_property
    def suffix(self) -> list[int]:
        """The ids that the post-processor puts behind a text, most often none."""
        return self._surroundings()[1]

    def _surroundings(self) -> tuple[list[int], list[int]]:
        encoded = guarded(lambda: self.tokenizer.encode("a"), "the tokenizer cannot encode 'a'")
        ids, mask = encoded.ids, encoded.special_tokens_mask
        front = sum(1 for _ in takewhile(bool, mask))
        behind = sum(1 for _ in takewhile(bool, reversed(mask[front:])))
        return ids[:front], ids[len(ids) - behind :]

    def generation_config(self, given: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
        """Complete a generation configuration, whose "eos_token_id" is a list of ids.

        The tokenizer's EOS and the known end-of-turn tokens are added to the list, if the model's
        ``vocab_size`` tokens include them; "prompt_prefix" is what a prompt begins with.
        """
        known = self.tokenizer.get_vocab(with_added_tokens=True)
        vocabulary = {text: index for text, index in known.items() if index < vocab_size}
        own = vocabulary.get(self.config.get("eos_token") or "")
        declared = [*given["eos_token_id"], *([] if own is None else [own])]
        ends = end_ids(declared, vocabulary)
        return {**given, "eos_token_id": ends, "prompt_prefix": self.prefix}

    def write(self, directory: Path) -> list[str]:
        """Write both files; return their names."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TOKENIZER_FILE).write_text(self.tokenizer.to_str(), encoding="utf-8")
        flags = {"add_bos_token": bool(self.prefix), "add_eos_token": bool(self.suffix)}
        text = json.dumps({**self.config, **flags}, indent=2, ensure_ascii=False) + "\n"
        (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
        return [TOKENIZER_FILE, CONFIG_FILE]
