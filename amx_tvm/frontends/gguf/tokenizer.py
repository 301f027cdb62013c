"""A GGUF vocabulary as a ``tokenizers`` object: byte-level BPE and sentencepiece BPE.

``tokenizer.ggml.model`` is "gpt2" for vocabularies with merges over byte characters, and "llama"
for sentencepiece vocabularies, which have scores in place of merges: sentencepiece always joins
the pair whose joined piece scores best, so the merges are all splits of all pieces in the order of
their scores. A character without a piece becomes its UTF-8 bytes, tokens "<0x00>" to "<0xFF>".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from amx_tvm.errors import ModelError
from amx_tvm.frontends.gguf.chat_templates import chat_templates
from amx_tvm.frontends.gguf.pretokenizers import find_kind
from amx_tvm.frontends.gguf.vocabulary import (
    BYTE_LEVEL,
    CONTROL,
    HIDDEN,
    NORMAL,
    SENTENCEPIECE,
    SHADOWED,
    UNKNOWN,
    USER_DEFINED,
    Metadata,
    Vocabulary,
)
from amx_tvm.frontends.model_tokenizer import ModelTokenizer

# Phi-3's own tokenizer eats the spaces behind its special tokens, but these; GGUF cannot say so,
# and llama.cpp knows the model by its name too.
_KEEPS_SPACES = ("<unk>", "<s>", "<|endoftext|>")


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
    vocabulary = Vocabulary.read(metadata, path)
    model = metadata.get("tokenizer.ggml.model")
    if model == BYTE_LEVEL:
        tokenizer = _byte_level(vocabulary, path)
    elif model == SENTENCEPIECE:
        tokenizer = _sentencepiece(vocabulary, path)
    else:
        raise ModelError(
            f"{path} has a vocabulary of the kind {model!r}; supported are {BYTE_LEVEL!r} "
            f"(byte-level BPE) and {SENTENCEPIECE!r} (sentencepiece BPE)"
        )
    name = str(metadata.get("general.name") or "").lower()
    phi3 = "phi-3" in name or "phi3" in name
    tokens: dict[bool, list[AddedToken]] = {True: [], False: []}
    for text, kind in zip(vocabulary.names, vocabulary.kinds, strict=True):
        special = kind in (CONTROL, UNKNOWN)
        if (special or kind == USER_DEFINED) and SHADOWED not in text:
            strip = phi3 and text not in _KEEPS_SPACES
            # Not normalized: a special token is looked for in the text as it was given.
            token = AddedToken(text, normalized=False, special=special, rstrip=strip)
            tokens[special].append(token)
    tokenizer.add_special_tokens(tokens[True])
    tokenizer.add_tokens(tokens[False])
    _add_bos_eos(tokenizer, vocabulary)
    return tokenizer


def gguf_tokenizer(metadata: Metadata, context_length: int, path: object) -> ModelTokenizer:
    """Return the tokenizer of a GGUF file with its configuration."""
    vocabulary = Vocabulary.read(metadata, path)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.text_of("bos"),
        "eos_token": vocabulary.text_of("eos"),
        "unk_token": vocabulary.text_of("unknown"),
        "pad_token": vocabulary.text_of("padding"),
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    templates = chat_templates(metadata, path)
    if templates:
        config["chat_template"] = templates
    return ModelTokenizer(build_tokenizer(metadata, path), config)


def write_gguf_tokenizer(
    metadata: Metadata, directory: Path, context_length: int, path: object
) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json; return their names."""
    return gguf_tokenizer(metadata, context_length, path).write(directory)


def _byte_level(vocabulary: Vocabulary, path: object) -> Tokenizer:
    metadata = vocabulary.metadata
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelError(f"{path} has no key 'tokenizer.ggml.merges'; a gpt2 vocabulary needs it")
    kind = find_kind(metadata.get("tokenizer.ggml.pre", "default"))
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ModelError(f"the merges in {path} are damaged: two tokens and a space make one")
    try:
        model = models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary.names)},
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
    tokenizer.decoder = _decoder(vocabulary, [decoders.ByteLevel()])
    return tokenizer


def _decoder(vocabulary: Vocabulary, steps: list[Any]) -> Any:
    """Return a decoder of steps, in front of which marked tokens get their own text or none."""
    if vocabulary.marked(SHADOWED):
        steps = [decoders.Replace(SHADOWED, ""), *steps]
    if vocabulary.marked(HIDDEN):
        steps = [decoders.Replace(Regex(f"[^{HIDDEN}]*{HIDDEN}+"), ""), *steps]
    return decoders.Sequence(steps) if len(steps) > 1 else steps[0]


def _sentencepiece(vocabulary: Vocabulary, path: object) -> Tokenizer:
    metadata, tokens = vocabulary.metadata, vocabulary.names
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
            merges=merges_from_scores(tokens, np.asarray(scores), vocabulary.kinds),
            unk_token=vocabulary.text_of("unknown") or "<unk>",
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
    tokenizer.decoder = _decoder(vocabulary, steps)
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


def _add_bos_eos(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Let ``encode(..., add_special_tokens=True)`` add BOS and EOS as the model wants them."""
    bos, eos = (vocabulary.text_of(k) if vocabulary.adds(k) else None for k in ("bos", "eos"))
    if bos or eos:
        template = [token for token in (bos, "$A", eos) if token]
        ids = [(token, tokenizer.token_to_id(token)) for token in {bos, eos} if token]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=[*template, "$B:1"], special_tokens=ids
        )
