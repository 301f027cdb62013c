"""Modules on a GPU beside torch, in turn: a vision transformer, and a model of embeddings.

    python -m benchmarks.gpu.modules --out build/modules [--encoder DIRECTORY] [--json modules.json]

The transformer is ViT-B/16 with random weights, 16 images; torch runs it in float16, as it is and
through torch.compile. The encoder embeds 64 texts of 64 tokens, from ids on the host to vectors on
the host; torch runs it in float16 with its own attention. Artifacts that are there already are not
compiled again. Also prints how far results are from torch's in float32, and for the transformer
from those with the rounded weights, which is float16's part.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import amx_tvm

IMAGES, TEXTS, TOKENS = 16, 64, 64
ROUNDS, CALLS = 21, 10


class Features(torch.nn.Module):
    """The last hidden states of a ViT-B/16 of random weights."""

    def __init__(self) -> None:
        from transformers import ViTConfig, ViTModel

        super().__init__()
        torch.manual_seed(0)
        self.model = ViTModel(ViTConfig(), add_pooling_layer=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images [b, 3, 224, 224] to [b, 197, 768]."""
        return self.model(x).last_hidden_state


def speeds(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of a call, each in turn with the others; the median and quartiles."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 2):
        for name in calls if turn % 2 else reversed(calls):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                calls[name]()
            torch.cuda.synchronize()
            if turn > 1:
                found[name].append((time.perf_counter() - start) / CALLS)
    return {name: [float(np.percentile(v, p)) for p in (50, 25, 75)] for name, v in found.items()}


def artifact(path: Path, model: Any, target: str, **options: Any) -> Path:
    """Compile a model unless that has been done."""
    if not path.exists():
        amx_tvm.compile(model, target, output=path, **options)
    return path


def rounded(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy on the CPU whose linears have the weights of four bits."""
    from amx_tvm import formats

    fmt, made = formats.get("amxfp4"), copy.deepcopy(module).cpu()
    for part in made.modules():
        if isinstance(part, torch.nn.Linear):
            values = fmt.dequantize(fmt.quantize(part.weight.numpy().copy()))
            part.weight.copy_(torch.from_numpy(values))
    return made


@torch.no_grad()
def vit(out: Path, target: str) -> dict[str, Any]:
    """Time images."""
    module, images = Features().eval(), torch.randn(IMAGES, 3, 224, 224)
    place = artifact(out / "vit", module, target, example_inputs=(images,))
    engine, given = amx_tvm.load(place), images.cuda()
    expected = module.cuda()(given)
    got = torch.from_dlpack(engine(given))
    same = rounded(module).cuda()(given)
    errors = [float((got - x).norm() / x.norm()) for x in (expected, same)]
    module, half = module.half(), given.half()
    compiled = torch.compile(module)
    graphs = torch.compile(module, mode="reduce-overhead")
    calls = {
        "ours": lambda: engine(given),
        "torch.compile": lambda: compiled(half),
        "torch.compile, graphs": lambda: graphs(half),
        "torch": lambda: module(half),
    }
    for call in calls.values():
        call()
    return {"errors": errors, "seconds": speeds(calls)}


@torch.no_grad()
def encoder(out: Path, directory: Path, target: str) -> dict[str, Any]:
    """Time texts."""
    from transformers import AutoModel

    engine = amx_tvm.load(artifact(out / "encoder", directory, target))
    model = AutoModel.from_pretrained(directory, attn_implementation="sdpa").float().eval().cuda()
    random = np.random.default_rng(0)
    tokens = random.integers(1000, 20000, (TEXTS, TOKENS)).tolist()

    def vectors() -> np.ndarray:
        ids = torch.tensor(tokens).cuda(non_blocking=True)
        made = model(ids).last_hidden_state.mean(1).float()
        return torch.nn.functional.normalize(made, dim=1).cpu().numpy()

    cosines = (engine.vectors(tokens) * vectors()).sum(1)
    model = model.half()
    calls = {"ours": lambda: engine.vectors(tokens), "torch": vectors}
    found = {"cosines": [float(cosines.mean()), float(cosines.min())], "seconds": speeds(calls)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="a model of embeddings, such as MiniLM")
    parser.add_argument("--target", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    if args.encoder:
        found["encoder"] = encoder(args.out, args.encoder, args.target)
        print(json.dumps(found["encoder"]), flush=True)
    found["vit"] = vit(args.out, args.target)
    print(json.dumps(found["vit"]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
