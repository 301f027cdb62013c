"""A float32 torch model with the weights that an artifact holds, and the text it is tested on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from amx_tvm import formats
from amx_tvm.frontends import ModelSource

OPTICKS_START, WINDOW = 20000, 1024


def opticks() -> str:
    """Newton's Opticks, as the apache-tvm-ffi wheel carries it, from character 20000."""
    root = Path(importlib.util.find_spec("tvm_ffi").submodule_search_locations[0])
    path = root / "3rdparty/libbacktrace/Isaac.Newton-Opticks.txt"
    return path.read_text(encoding="utf-8", errors="replace")[OPTICKS_START:]


def torch_model(source: ModelSource, weights: str, head: str):
    """LlamaForCausalLM in float32; linears rounded to ``weights``, table and head to ``head``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {k: v for k, v in source.config.items() if k not in ("architectures", "model_type")}
    with torch.no_grad():
        model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    state = {}
    for name in source.names():
        array = source.load(name)
        table = "embed_tokens" in name or "lm_head" in name
        chosen = head if table else weights
        if array.ndim == 2 and chosen != "none":
            array = formats.quantize_dequantize(chosen, array)
        state[name] = torch.from_numpy(np.array(array, np.float32))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def torch_logits(model, ids: list[int]) -> np.ndarray:
    """Logits float32 [n, vocab]."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def perplexity(logits_of, ids: list[int], windows: int, length: int = WINDOW) -> float:
    """Perplexity over consecutive windows; each window predicts its own tokens 1 .. n-1."""
    import torch

    total, count = 0.0, 0
    for w in range(windows):
        chunk = ids[w * length : (w + 1) * length]
        logits, targets = torch.as_tensor(logits_of(chunk)[:-1]), torch.tensor(chunk[1:])
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().sum()
        count += length - 1
    return float(np.exp(float(total) / count))
