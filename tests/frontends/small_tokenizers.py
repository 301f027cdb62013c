"""Small tokenizers of the families' kinds, trained on a page of text."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from amx_tvm.frontends.gguf.pretokenizers import find_kind

SPECIALS = ("<|start|>", "<|stop|>", "<|user|>")
PAGE = (
    """I'm sure you'LL see that they're there, in 1998 or 2024: x = 10**3 + y_2; {"a": [1, 2]}
def f(self):\n\treturn "ok"  # done\n\nÜber naïve café — “quoted” 日本語のテキスト, Привет мир! ½ 🙂
"""
    * 3
)
TEXTS = (
    "", " ", "  two  spaces ", "Hello there", " Hello", "I'm you'LL 1998\n\n\tx  ", "cafe\u0301 ½",
    "日本語 🙂 Привет", "<|start|>Hi<|stop|>\n<|user|> x", " <|user|>  a  <|user|>b", "a<|stop|>",
    "<tool> <|extra|> x <tool>y", "<|new|>x <|new|>  y <|pad|>", "\r\n a\u3000b",
)  # fmt: skip


def byte_level(kind, template=None):
    """A byte-level BPE as GGUF's ``tokenizer.ggml.pre`` calls it."""
    entry = find_kind(kind)
    tokenizer = Tokenizer(models.BPE(ignore_merges=entry.ignore_merges))
    if entry.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = entry.build()
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet(), template)


def sentencepiece(normalizer=None, pre_tokenizer=None, prefix=True, template="<|start|> $A"):
    """A BPE over characters with "▁" for spaces and bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator([PAGE], trainer)
    state = json.loads(tokenizer.to_str())
    kept = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps({**state, "added_tokens": kept}))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    if template:
        tokenizer.post_processor = surrounding(tokenizer, template)
    return tokenizer


def surrounding(tokenizer, template):
    """A post-processor like "<|start|> $A <|stop|>"."""
    ids = [(token, tokenizer.token_to_id(token)) for token in SPECIALS]
    return processors.TemplateProcessing(single=template, special_tokens=ids)


def _trained(tokenizer, alphabet, template):
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIALS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([PAGE], trainer)
    if template:
        tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), surrounding(tokenizer, template)]
        )
    return tokenizer


SPACE = normalizers.Replace(" ", "▁")
LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), SPACE])
BOS = "<|start|> $A"

# family: (tokenizer, model_type, fields of tokenizer_config.json)
FAMILIES = {
    "gpt2": (lambda: byte_level("gpt-2"), "gpt2", {"tokenizer_class": "GPT2Tokenizer"}),
    "llama3": (
        lambda: byte_level("llama-bpe", BOS),
        "llama",
        {"tokenizer_class": "PreTrainedTokenizerFast"},
    ),
    "llama2-legacy": (
        lambda: sentencepiece(LEGACY),
        "llama",
        {"tokenizer_class": "LlamaTokenizer", "legacy": True},
    ),
    "llama2": (
        lambda: sentencepiece(LEGACY),
        "llama",
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": False, "add_bos_token": True},
    ),
    "mistral": (
        lambda: sentencepiece(
            pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        ),
        "mistral",
        {"tokenizer_class": "LlamaTokenizer"},
    ),
    "phi3": (
        lambda: sentencepiece(LEGACY, template=None),
        "phi3",
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False},
    ),
    "gemma": (
        lambda: sentencepiece(
            SPACE, pre_tokenizers.Split(" ", "merged_with_previous"), prefix=False
        ),
        "gemma3_text",
        {"tokenizer_class": "GemmaTokenizer"},
    ),
    "qwen2": (lambda: byte_level("qwen2"), "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}),
    "qwen3": (lambda: byte_level("qwen2"), "qwen3", {"tokenizer_class": "Qwen2Tokenizer"}),
    "deepseek": (
        lambda: byte_level("qwen2", BOS),
        "llama",
        {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "legacy": True},
    ),
    "smollm": (lambda: byte_level("smollm"), "llama", {}),
    "gpt-oss": (lambda: byte_level("gpt-4o"), "gpt_oss", {}),
    "olmo2": (lambda: byte_level("dbrx", "$A <|stop|>"), "olmo2", {"add_eos_token": False}),
}

NAMED = {"bos_token": "<|start|>", "eos_token": "<|stop|>", "unk_token": None}
FIELDS = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def write_directory(place: Path, family: str, tokenizer=None, config=None, **files) -> Path:
    """Write a model directory without weights; ``files`` are more JSON files by their stems."""
    make, model_type, own = FAMILIES[family]
    place.mkdir(parents=True, exist_ok=True)
    (tokenizer or make()).save(str(place / "tokenizer.json"))
    unknown = "<unk>" if "llama2" in family or family in ("mistral", "phi3", "gemma") else None
    written = {**NAMED, "unk_token": unknown, **own, **(config or {})}
    files = {
        "config": {"model_type": model_type, **FIELDS},
        "tokenizer_config": written,
        **files,
    }
    for stem, value in files.items():
        (place / f"{stem}.json").write_text(json.dumps(value))
    return place


def added(content, **flags):
    """An entry of added_tokens_decoder."""
    defaults = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, **defaults, "special": True, **flags}


def listed(tokenizer: Tokenizer) -> dict[str, dict]:
    """The added_tokens_decoder of a tokenizer's own added tokens."""
    return {
        str(index): {name: getattr(token, name) for name in added("").keys()}
        for index, token in tokenizer.get_added_tokens_decoder().items()
    }
