"""How a GGUF vocabulary's text is cut before merging: one entry a kind of ``tokenizer.ggml.pre``.

GGUF stores only a name; the patterns are those of the models' own tokenizer.json files. Every step
isolates what its pattern matches and hands the pieces on; the last one maps bytes to the printable
characters of GPT-2's alphabet. Adding a kind is one entry here, checked against the model's own
tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from amx_tvm.errors import ModelError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
# o200k and Tekken cut words where lower case is followed by upper case.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(contractions: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{start}{_UPPER}*{_LOWER}+{contractions}|{start}{_UPPER}+{_LOWER}*{contractions}|"
        f"{digits}|{_CASED_TAIL}"
    )


_GPT4O = _cased(_CONTRACTIONS + "?", r"\p{N}{1,3}")
_TEKKEN = _cased("", r"\p{N}")


@dataclass(frozen=True)
class PreTokenizerKind:
    """One way of cutting text.

    Attributes
    ----------
    patterns : tuple of str
        Regular expressions, applied one after the other.
    nfc : bool
        Compose Unicode characters first.
    ignore_merges : bool
        A piece that is a token stays one, whatever the merges say.
    add_bos : bool
        Whether a text starts with BOS where the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> PreTokenizer:
        """Return the pre-tokenizer."""
        steps: list[PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns
        ]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)


_GPT2_KIND = PreTokenizerKind((_GPT2,))
_DIGITS_KIND = PreTokenizerKind((r"\p{N}", _GPT2))
_LLAMA3_KIND = PreTokenizerKind((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_KIND = PreTokenizerKind((_QWEN2,), nfc=True)

KINDS = {
    "default": PreTokenizerKind((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _GPT2_KIND,
    "olmo": _GPT2_KIND,
    "smollm": _DIGITS_KIND,
    "starcoder": _DIGITS_KIND,
    "refact": _DIGITS_KIND,
    "command-r": _DIGITS_KIND,
    "llama-bpe": _LLAMA3_KIND,
    "llama3": _LLAMA3_KIND,
    "llama-v3": _LLAMA3_KIND,
    "falcon3": _LLAMA3_KIND,
    "dbrx": PreTokenizerKind((_LLAMA3,)),
    "smaug-bpe": PreTokenizerKind((_LLAMA3,)),
    "qwen2": _QWEN2_KIND,
    "deepseek-r1-qwen": _QWEN2_KIND,
    "tekken": PreTokenizerKind((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizerKind((_GPT4O,)),
}


def find_kind(name: str) -> PreTokenizerKind:
    """Return the entry of a ``tokenizer.ggml.pre`` value.

    Raises
    ------
    ModelError
        For a kind that is not in the table.
    """
    if name not in KINDS:
        raise ModelError(
            f"the pre-tokenizer {name!r} of this GGUF vocabulary is not supported; supported are "
            + ", ".join(sorted(KINDS))
            + " (put the model's own tokenizer.json into a Hugging Face directory instead)"
        )
    return KINDS[name]
