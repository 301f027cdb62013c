"""Perplexity, KL divergence and top-1 agreement of anything that maps token ids to logits.

An engine's `logits`, a torch model behind `torch_logits`, or any other callable is measured by the
same code; nothing here knows about artifacts or imports torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from amx_tvm.errors import EvaluationError
from amx_tvm.evaluation.metrics import Sums, score
from amx_tvm.evaluation.windows import Window

Logits = Callable[[Sequence[int]], np.ndarray]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Result:
    """What one candidate scored.

    Attributes
    ----------
    name : str
        The candidate.
    perplexity : float
        exp of the mean negative log-likelihood of the scored tokens.
    stderr : float
        Standard error of the perplexity over windows; nan for a single window.
    accuracy : float
        Share of scored tokens that were the candidate's most likely ones.
    kl, top1 : float or None
        Mean KL(reference || candidate) in nats, and share of positions where the most likely
        token agrees with the reference's; None without a reference.
    tokens, windows : int
        Scored tokens and windows.
    bits : float or None
        Stored bits a weight, where known.
    seconds : float
        Wall time of the candidate's logits.
    """

    name: str
    perplexity: float
    stderr: float
    accuracy: float
    kl: float | None
    top1: float | None
    tokens: int
    windows: int
    bits: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values (nan as null)."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }


def measure(
    candidate: Logits,
    windows: Sequence[Window],
    *,
    reference: Logits | None = None,
    name: str = "model",
    bits: float | None = None,
    progress: Progress | None = None,
) -> Result:
    """Score a candidate on windows, against a reference where there is one.

    Parameters
    ----------
    candidate, reference : callable
        Token ids [n] -> real logits [n, vocab], row i following tokens 0..i.
    windows : list of Window
        From `amx_tvm.evaluation.windows.cut`.
    progress : callable, optional
        Called with (done, total, text with the perplexity so far).

    Raises
    ------
    EvaluationError
        When logits have a wrong shape, are not finite, or the vocabularies differ.
    """
    parts: list[Sums] = []
    total, seconds = Sums(), 0.0
    for done, window in enumerate(windows):
        if progress is not None:
            progress(done, len(windows), _so_far(name, total))
        ids = window.ids.tolist()
        began = time.perf_counter()
        logits = _checked(candidate(ids), len(ids), name)
        seconds += time.perf_counter() - began
        known = None
        if reference is not None:
            known = _checked(reference(ids), len(ids), "the reference")
            if known.shape != logits.shape:
                raise EvaluationError(
                    f"{name} has a vocabulary of {logits.shape[1]} and the reference one of "
                    f"{known.shape[1]}; they must share their tokenizer"
                )
            known = known[window.first - 1 : -1]
        part = score(logits[window.first - 1 : -1], window.ids[window.first :], known)
        parts.append(part)
        total += part
    if progress is not None:
        progress(len(windows), len(windows), _so_far(name, total))
    if not total.tokens:
        raise EvaluationError("no windows were given, so there is nothing to score")
    perplexity = math.exp(total.nll / total.tokens)
    return Result(
        name=name,
        perplexity=perplexity,
        stderr=perplexity * _spread(parts),
        accuracy=total.correct / total.tokens,
        kl=total.kl / total.positions if total.positions else None,
        top1=total.agree / total.positions if total.positions else None,
        tokens=total.tokens,
        windows=len(windows),
        bits=bits,
        seconds=seconds,
    )


def _checked(logits: np.ndarray, tokens: int, name: str) -> np.ndarray:
    logits = np.asarray(logits)
    if logits.ndim != 2 or len(logits) != tokens:
        raise EvaluationError(
            f"{name} answers {tokens} tokens with logits of shape {logits.shape}; expected "
            f"({tokens}, vocabulary)"
        )
    if not np.isfinite(logits).all():
        raise EvaluationError(f"the logits of {name} are not all finite; the model is damaged")
    return logits


def _so_far(name: str, total: Sums) -> str:
    if not total.tokens:
        return name
    return f"{name}: perplexity {math.exp(total.nll / total.tokens):.2f}"


def _spread(parts: Sequence[Sums]) -> float:
    """Standard error of the mean negative log-likelihood over windows."""
    if len(parts) < 2:
        return math.nan
    means = np.array([part.nll / part.tokens for part in parts])
    return float(means.std(ddof=1) / math.sqrt(len(means)))


def torch_logits(model: Any) -> Logits:
    """Wrap a torch module that maps ids [1, n] to logits [1, n, vocab], or to an object with them.

    transformers' causal language models are such modules.
    """

    def logits(ids: Sequence[int]) -> np.ndarray:
        import torch

        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with torch.inference_mode():
            out = model(torch.tensor([list(ids)], device=device))
        return getattr(out, "logits", out)[0].float().cpu().numpy()

    return logits
