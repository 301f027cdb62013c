"""Numbers from logits, in NumPy: negative log-likelihood, KL divergence, top-1 agreement.

Rows are processed in blocks, so that a window of 2048 tokens times a vocabulary of 128 k needs no
second copy of its logits. Sums are kept in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROWS = 64


@dataclass
class Sums:
    """What a window, or all windows, add up to.

    nll : sum of -ln p(next token), over `tokens` scored predictions
    correct : scored predictions whose most likely token is the next one
    kl : sum of KL(reference || candidate) in nats, over `positions` scored positions
    agree : positions where both have the same most likely token
    """

    nll: float = 0.0
    tokens: int = 0
    correct: int = 0
    kl: float = 0.0
    agree: int = 0
    positions: int = 0

    def __iadd__(self, other: Sums) -> Sums:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities float64 [rows, vocab] of logits."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def score(logits: np.ndarray, targets: np.ndarray, reference: np.ndarray | None = None) -> Sums:
    """Score predictions.

    Parameters
    ----------
    logits : real [n, vocab], row i predicting targets[i]
    targets : integer [n]
    reference : real [n, vocab], logits of the reference for the same positions

    Returns
    -------
    Sums
    """
    total = Sums(tokens=len(targets))
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        want = targets[rows]
        logp = log_softmax(np.asarray(logits[rows]))
        best = logp.argmax(axis=-1)
        total.nll -= float(np.take_along_axis(logp, want[:, None], axis=-1).sum())
        total.correct += int((best == want).sum())
        if reference is not None:
            known = log_softmax(np.asarray(reference[rows]))
            total.agree += int((known.argmax(axis=-1) == best).sum())
            total.positions += len(want)
            logp -= known
            # A probability that underflows to 0 contributes nothing.
            total.kl -= float((np.exp(known, out=known) * logp).sum())
    return total
