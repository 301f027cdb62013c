"""Tiny random models of embeddings, saved as sentence-transformers keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from .tiny import SHAPE, VOCAB, WINDOW

BERT = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"} | {"vocab_size": VOCAB}
PROMPTS = {"query": "w7 w8 w9 ", "document": ""}

# Family: the class of its configuration, what differs from SHAPE, and its pooling.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("BertConfig", BERT, {"pooling_mode_mean_tokens": True, "include_prompt": False}),
    "roberta": (
        "XLMRobertaConfig",
        BERT | {"pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    ),
    "modernbert": (
        "ModernBertConfig",
        BERT | {"num_hidden_layers": 3, "local_attention": 16},
        {"pooling_mode": "mean"},
    ),
    "embedding-gemma": (
        "Gemma3TextConfig",
        SHAPE
        | {"head_dim": 32, "sliding_window": WINDOW, "use_bidirectional_attention": True}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        {"pooling_mode": "mean"},
    ),
    "qwen3-embedding": (
        "Qwen3Config",
        SHAPE | {"head_dim": 16, "tie_word_embeddings": True},
        {"pooling_mode_lasttoken": True},
    ),
}
DENSE = {"embedding-gemma": (64, 48)}  # a layer behind the pooling, with tanh


def make(family: str, directory: Path) -> torch.nn.Module:
    """Write a model and return it in float32 as transformers reads it back."""
    class_name, fields, pooling = CASES[family]
    config = getattr(transformers, class_name)(**fields)
    torch.manual_seed(3)
    build = transformers.AutoModelForCausalLM if "qwen" in family else transformers.AutoModel
    model = build.from_config(config).float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.2)
            else:
                spread = 0.3 if "embed" in name else 1.5 * value.shape[-1] ** -0.5
                value.copy_(torch.randn_like(value) * spread)
    model.save_pretrained(directory)
    _write_modules(directory, pooling, DENSE.get(family))
    _write_tokenizer(directory, causal="qwen" in family)
    return transformers.AutoModel.from_pretrained(directory, attn_implementation="eager").float()


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_modules(directory: Path, pooling: dict[str, Any], dense: tuple[int, int] | None) -> None:
    chain = {"": "Transformer", "1_Pooling": "Pooling"} | ({"2_Dense": "Dense"} if dense else {})
    chain["3_Normalize"] = "Normalize"
    prefix = "sentence_transformers.models."
    modules = [{"path": path, "type": prefix + kind} for path, kind in chain.items()]
    _write(directory / "modules.json", modules)
    _write(directory / "1_Pooling/config.json", pooling)
    _write(directory / "config_sentence_transformers.json", {"prompts": PROMPTS})
    _write(directory / "sentence_bert_config.json", {"max_seq_length": 96})
    if dense is not None:
        sizes = dict(zip(("in_features", "out_features"), dense, strict=True))
        function = "torch.nn.modules.activation.Tanh"
        values = {**sizes, "bias": True, "activation_function": function}
        _write(directory / "2_Dense/config.json", values)
        layer = torch.nn.Linear(*dense)
        weights = {f"linear.{name}": value for name, value in layer.state_dict().items()}
        save_file(weights, directory / "2_Dense/model.safetensors")


def _write_tokenizer(directory: Path, causal: bool) -> None:
    words = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "$A w2" if causal else "w3 $A w2"
    named = [("w2", 2), ("w3", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write(directory / "tokenizer_config.json", {})


def vectors(
    model: torch.nn.Module, directory: Path, tokens: list[list[int]], skipped: int = 0
) -> np.ndarray:
    """Return the vectors of texts by torch, one at a time."""
    settings = json.loads((directory / "1_Pooling/config.json").read_text(encoding="utf-8"))
    found = []
    for ids in tokens:
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0]
        if settings.get("pooling_mode_cls_token"):
            made = hidden[0]
        elif settings.get("pooling_mode_lasttoken"):
            made = hidden[-1]
        else:
            made = hidden[skipped:].mean(0)
        if (directory / "2_Dense").is_dir():
            weights = load_file(directory / "2_Dense/model.safetensors")
            made = torch.tanh(weights["linear.weight"] @ made + weights["linear.bias"])
        found.append(torch.nn.functional.normalize(made, dim=0).numpy())
    return np.stack(found)
