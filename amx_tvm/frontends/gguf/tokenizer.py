"""A GGUF vocabulary as a ``tokenizers`` object: byte-level BPE and sentencepiece BPE.

``tokenizer.ggml.model`` is "gpt2" for vocabularies with merges over byte characters, and "llama"
for sentencepiece vocabularies, which have scores in place of merges: sentencepiece always joins
the pair whose joined piece scores best, so the merges are all splits of all pieces in the order of
their scores. A character without a piece becomes its UTF-8 bytes, tokens "<0x00>" to "<0xFF>".
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from amx_tvm.errors import ModelError
from amx_tvm.frontends.gguf.pretokenizers import find_kind
from amx_tvm.frontends.hf.tokenizer import write_tokenizer_files

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

# GGUF names one EOS; the tokens that end a turn or a text in the known families are found by text.
END_TOKENS = frozenset(
    {
        "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
        "<end_of_turn>", "<|end|>", "<|return|>", "<eos>", "<EOT>",
    }
)  # fmt: skip

Metadata = dict[str, Any]


def end_of_generation_ids(metadata: Metadata) -> list[int]:
    """Return the ids of all tokens that end a generation, the declared EOS first."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    declared = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ids = [int(index) for index in declared if index is not None]
    ids += [
        index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (CONTROL, USER_DEFINED) and token in END_TOKENS
    ]
    return list(dict.fromkeys(ids))


def build_tokenizer(metadata: Metadata, path: object) -> Tokenizer:
    """Return the tokenizer of a GGUF file.

    Parameters
    ----------
    metadata : dict
        The file's keys, of which those under ``tokenizer.ggml`` are read.
    path : path-like
        The file, for messages.

    Raises
    ------
    ModelError
        When a key is missing, the vocabulary is inconsistent, or its kind is not supported.
    """
    tokens = _tokens(metadata, path)
    kinds = metadata.get("tokenizer.ggml.token_type")
    kinds = np.ones(len(tokens), np.int32) if kinds is None else kinds
    if len(kinds) != len(tokens):
        raise ModelError(f"{path} has {len(tokens)} tokens, but {len(kinds)} token types")
    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(metadata, tokens, path)
    elif model == "llama":
        tokenizer = _sentencepiece(metadata, tokens, kinds, path)
    else:
        raise ModelError(
            f"{path} has a vocabulary of the kind {model!r}; supported are 'gpt2' (byte-level "
            "BPE) and 'llama' (sentencepiece BPE)"
        )
    # Not normalized: a special token is looked for in the text as it was given.
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, UNKNOWN)]
    defined = [t for t, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in defined])
    _add_bos_eos(tokenizer, metadata)
    return tokenizer


def adds(metadata: Metadata, key: str) -> bool:
    """Return whether a text gets a BOS or EOS token (``key`` "bos" or "eos")."""
    declared = metadata.get(f"tokenizer.ggml.add_{key}_token")
    if declared is not None:
        return bool(declared)
    if key == "eos":
        return False
    if metadata.get("tokenizer.ggml.model") == "llama":
        return True
    return find_kind(metadata.get("tokenizer.ggml.pre", "default")).add_bos


def special_token(metadata: Metadata, key: str) -> str | None:
    """Return the text of the special token ``key`` ("bos", "eos", "unknown", "padding")."""
    index = metadata.get(f"tokenizer.ggml.{key}_token_id")
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    return tokens[index] if index is not None and 0 <= index < len(tokens) else None


def write_gguf_tokenizer(
    metadata: Metadata, directory: Path, context_length: int, path: object
) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json; return their names."""
    tokenizer = build_tokenizer(metadata, path)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special_token(metadata, "bos"),
        "eos_token": special_token(metadata, "eos"),
        "unk_token": special_token(metadata, "unknown"),
        "pad_token": special_token(metadata, "padding"),
        "add_bos_token": adds(metadata, "bos"),
        "add_eos_token": adds(metadata, "eos"),
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    if metadata.get("tokenizer.chat_template"):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return write_tokenizer_files(directory, tokenizer.to_str(), config)


def _tokens(metadata: Metadata, path: object) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ModelError(f"{path} has no key 'tokenizer.ggml.tokens': it carries no vocabulary")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        twice = collections.Counter(tokens).most_common(1)[0][0]
        raise ModelError(f"{path} has the token {twice!r} twice in its vocabulary")
    return tokens


def _byte_level(metadata: Metadata, tokens: list[str], path: object) -> Tokenizer:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelError(f"{path} has no key 'tokenizer.ggml.merges'; a gpt2 vocabulary needs it")
    kind = find_kind(metadata.get("tokenizer.ggml.pre", "default"))
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ModelError(f"the merges in {path} are damaged: two tokens and a space make one")
    try:
        model = models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=pairs,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=kind.ignore_merges,
        )
    except Exception as error:  # the library raises a bare Exception
        raise ModelError(f"the merges in {path} do not fit its vocabulary: {error}") from error
    tokenizer = Tokenizer(model)
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = kind.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    metadata: Metadata, tokens: list[str], kinds: np.ndarray, path: object
) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ModelError(
            f"{path} has {0 if scores is None else len(scores)} scores for {len(tokens)} tokens; "
            "a sentencepiece vocabulary needs one each"
        )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges_from_scores(tokens, np.asarray(scores), kinds),
            unk_token=special_token(metadata, "unknown") or "<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_from_scores(
    tokens: list[str], scores: np.ndarray, kinds: np.ndarray
) -> list[tuple[str, str]]:
    """Return the merges of a sentencepiece BPE vocabulary, best score first.

    Of the splits of one piece the longest left part goes first, as Hugging Face's converter does.
    """
    known = set(tokens)
    merges: list[tuple[str, str]] = []
    for index in np.argsort(-scores, kind="stable"):
        if kinds[index] not in (NORMAL, USER_DEFINED):
            continue
        piece = tokens[index]
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                merges.append((left, right))
    return merges


def _add_bos_eos(tokenizer: Tokenizer, metadata: Metadata) -> None:
    """Let ``encode(..., add_special_tokens=True)`` add BOS and EOS as the model wants them."""
    bos = special_token(metadata, "bos") if adds(metadata, "bos") else None
    eos = special_token(metadata, "eos") if adds(metadata, "eos") else None
    if bos or eos:
        template = [token for token in (bos, "$A", eos) if token]
        ids = [(token, tokenizer.token_to_id(token)) for token in {bos, eos} if token]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=[*template, "$B:1"], special_tokens=ids
        )
