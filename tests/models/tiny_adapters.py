"""Random LoRA adapters of tiny models, and what torch makes of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file


def linears(model, ends=()):
    """Return the linears that PEFT's "all-linear" takes, by name; of some names only."""
    found = {}
    for name, module in model.named_modules():
        turned = type(module).__name__ == "Conv1D"
        plain = isinstance(module, torch.nn.Linear) and "Router" not in type(module).__name__
        other = name.endswith(("lm_head", ".gate", ".router")) or ".experts." in name
        if (turned or plain) and not other and (not ends or name.endswith(tuple(ends))):
            found[name] = (module, turned)
    return found


def pairs(model, rank, seed, ends=()):
    """Return {module: (A [rank, in], B [out, rank])}, whose products are as large as weights."""
    random = np.random.default_rng(seed)
    made = {}
    for name, (module, turned) in linears(model, ends).items():
        out, inner = module.weight.shape[::-1] if turned else module.weight.shape
        a = random.standard_normal((rank, inner)) * inner**-0.5
        b = random.standard_normal((out, rank)) * 0.3
        # as float16 holds them: the factor is a power of two
        made[name] = tuple(x.astype(np.float16).astype(np.float32) for x in (a, b))
    return made


def write(place: Path, given, rank, turned=False, **fields):
    """Write an adapter as PEFT's save_pretrained does."""
    place.mkdir(parents=True)
    tensors = {}
    for name, both in given.items():
        for letter, values in zip("AB", both, strict=True):
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = values
    save_file(tensors, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "fan_in_fan_out": turned}
    (place / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return place


def merged(model, given):
    """Return a copy of the model with W + 2 B A."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, (module, turned) in linears(made).items():
            if name in given:
                a, b = (torch.from_numpy(x) for x in given[name])
                module.weight.add_((2 * b @ a).T if turned else 2 * b @ a)
    return made
