"""Choose the next token from logits, in NumPy.

The steps and their order are those of Hugging Face's generation: bias, penalties, what may not be
chosen, temperature, top-k, top-p, min-p, then one draw. Every step works on as few candidates as
it can: a full sort of 128256 logits takes 10 ms, a threshold and a sort of what passes it 0.1 ms.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.options import Sampling
from amx_tvm.runtime.result import TokenLogprobs

_BLOCK = 512
_SORTED = 4096  # so few weights are sorted without narrowing them down


class BrokenLogits(GenerationError):
    """The model's logits are no numbers to choose by."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits hold NaN or infinity; its weights or its kernels are broken: check "
            "the model with quantization 'none', and report the kernel otherwise"
        )


class NothingAllowed(GenerationError):
    """A mask and ``min_tokens`` leave no token to choose."""

    def __init__(self) -> None:
        super().__init__("no token is allowed here; the mask of allowed tokens leaves none")


class Sampler:
    """The sampling state of one sequence: its random generator and the tokens it has seen.

    Parameters
    ----------
    options : Sampling
        What to do.
    tokens : sequence of int
        The prompt; the repetition penalty counts it as seen.
    stream : int
        Sequences of one batch with the same seed draw from different streams.
    """

    def __init__(self, options: Sampling, tokens: Sequence[int] = (), stream: int = 0):
        self.options = options
        entropy = None if options.seed is None else [options.seed, stream]
        self._random = np.random.default_rng(entropy)
        self._penalizes, self._draws = options.penalizes, options.draws
        self._seen: set[int] = set(tokens) if options.repetition_penalty != 1.0 else set()
        self._counts: dict[int, int] = {}  # of the tokens that were generated

    @property
    def random(self) -> np.random.Generator:
        """Where draws come from."""
        return self._random

    def __call__(
        self,
        logits: np.ndarray,
        allowed: np.ndarray | None = None,
        banned: Collection[int] = (),
    ) -> int:
        """Return the next token.

        Parameters
        ----------
        logits : ndarray
            float32 [vocab]; not changed.
        allowed : ndarray, optional
            bool [vocab]: the tokens that may be chosen, of a grammar for example.
        banned : collection of int
            Tokens that may not be.

        Raises
        ------
        GenerationError
            The logits are broken, or no token may be chosen.
        """
        options = self.options
        if allowed is not None and not banned and options.likeliest:
            token = _likeliest(logits, allowed)
        else:
            if allowed is not None or banned or options.logit_bias or self._counts or self._seen:
                logits = self._change(logits, allowed, banned)
            token = int(np.argmax(logits))
        if not np.isfinite(logits[token]):
            restricted = allowed is not None or banned
            raise NothingAllowed if restricted else BrokenLogits
        if self._draws:
            token = self._draw(logits)
        self.note(token)
        return token

    def note(self, token: int) -> None:
        """Count a token that was chosen, here or elsewhere."""
        if self._penalizes:
            self._counts[token] = self._counts.get(token, 0) + 1
            if self.options.repetition_penalty != 1.0:
                self._seen.add(token)

    def _change(
        self, logits: np.ndarray, allowed: np.ndarray | None, banned: Collection[int]
    ) -> np.ndarray:
        """Return the logits with what is not allowed at -inf, with bias and penalties."""
        options = self.options
        logits = logits.copy() if allowed is None else _kept(logits, allowed)  # -inf stays so
        for token, bias in options.logit_bias.items():
            logits[token] += np.float32(bias)
        if self._seen:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            penalty, values = np.float32(options.repetition_penalty), logits[seen]
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts and (options.presence_penalty or options.frequency_penalty):
            made = np.fromiter(self._counts, np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[made] -= np.float32(options.presence_penalty)
            logits[made] -= np.float32(options.frequency_penalty) * counts
        if banned:
            logits[list(banned)] = -np.inf
        return logits

    def _draw(self, logits: np.ndarray) -> int:
        options = self.options
        top = logits.max()
        tokens: np.ndarray | None = None  # None: all tokens, in order
        if 0 < options.top_k < logits.size:
            tokens = _largest(logits, options.top_k)
            logits = logits[tokens]
        weights = np.exp((logits - top) * np.float32(1.0 / options.temperature))
        if options.top_p < 1.0:
            kept = _nucleus(weights, options.top_p)
            weights = weights[kept]
            tokens = kept if tokens is None else tokens[kept]
        if options.min_p > 0.0:
            kept = np.flatnonzero(weights >= np.float32(options.min_p))  # the largest weight is 1
            weights = weights[kept]
            tokens = kept if tokens is None else tokens[kept]
        index = _pick(weights, self._random.random())
        return index if tokens is None else int(tokens[index])


def _kept(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return the logits with what is not allowed at -inf.

    Writing the fewer ones by their indices takes a third of what `numpy.where` takes.
    """
    _check_mask(logits, allowed)
    few = np.flatnonzero(allowed)
    if 2 * few.size < logits.size:
        kept = np.full_like(logits, -np.inf)
        kept[few] = logits[few]
    else:
        kept = logits.copy()
        kept[np.flatnonzero(~allowed)] = -np.inf
    return kept


def _likeliest(logits: np.ndarray, allowed: np.ndarray) -> int:
    """Return the most likely token that is allowed, the first one of equals."""
    _check_mask(logits, allowed)
    few = np.flatnonzero(allowed)
    if not few.size:
        raise NothingAllowed
    return int(few[np.argmax(logits[few])])


def _check_mask(logits: np.ndarray, allowed: np.ndarray) -> None:
    kind = getattr(allowed, "dtype", None), getattr(allowed, "shape", None)
    if kind != (np.bool_, logits.shape):
        raise GenerationError(
            f"the mask is {type(allowed).__name__} of {kind[0]} {kind[1]}, expected bool "
            f"[{logits.size}]"
        )


def logprobs(logits: np.ndarray, token: int, count: int) -> TokenLogprobs:
    """Return log-probabilities of a token and of the ``count`` most likely ones, best first."""
    shifted = logits.astype(np.float64) - float(logits.max())
    total = float(np.log(np.exp(shifted).sum()))
    best = _largest(logits, min(count, logits.size)) if count else np.zeros(0, np.int64)
    best = best[np.argsort(-logits[best], kind="stable")]
    top = [(int(index), float(shifted[index]) - total) for index in best]
    return TokenLogprobs(token, float(shifted[token]) - total, top)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the ``count`` largest values, ascending; of equals the first ones.

    A lower bound of the count-th largest comes from the maxima of disjoint groups (columns, so
    that the maximum runs over whole vectors): the count-th largest maximum has at least ``count``
    values at or above it. Few values pass it.
    """
    groups = max(512, 4 * count)
    candidates = np.arange(values.size)
    if values.size >= 4 * groups:
        used = values.size // groups * groups
        maxima = values[:used].reshape(-1, groups).max(axis=0)
        bound = np.partition(maxima, groups - count)[groups - count]
        candidates = np.flatnonzero(values >= bound)
    chosen = values[candidates]
    if count >= chosen.size:
        return candidates
    bound = np.partition(chosen, chosen.size - count)[chosen.size - count]
    return candidates[_above(chosen, bound, count)]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Return the indices of the smallest set of largest weights that holds ``top_p`` of the sum.

    Weights are relative to the largest, which is 1. Bisection encloses the smallest weight to
    keep in (low, high]: what is above ``high`` holds less than the goal, what is above ``low``
    at least the goal. Only what lies between is sorted. (A product with a mask is vectorized;
    `np.where` and boolean indices branch, ten times slower.)
    """
    total = float(weights.sum())
    goal = top_p * total
    high = 1.0
    likely = np.flatnonzero(weights >= np.float32(1e-3))
    if likely.size < _SORTED < weights.size and float(weights[likely].sum()) >= goal:
        # The usual case, a peaked distribution: a few hundred tokens hold the mass.
        return likely[_nucleus(weights[likely], goal / float(weights[likely].sum()))]
    low = 0.999 * (1.0 - top_p) * total / weights.size  # all below it together miss top_p - 1
    for _ in range(8 if weights.size > _SORTED else 0):
        middle = (low * high) ** 0.5
        if float((weights * (weights > np.float32(middle))).sum()) >= goal:
            low = middle
        else:
            high = middle
    above = weights > np.float32(high)
    mass = float((weights * above).sum())
    between = np.sort(np.compress((weights > np.float32(low)) ^ above, weights))[::-1]
    reached = int(np.searchsorted(mass + np.cumsum(between, dtype=np.float64), goal))
    reached = min(reached, between.size - 1)  # rounding of the sums
    return _above(weights, between[reached], int(np.count_nonzero(above)) + reached + 1)


def _above(values: np.ndarray, bound: np.floating, count: int) -> np.ndarray:
    """Return the indices of ``count`` values, all above ``bound`` and the first that equal it."""
    kept = np.flatnonzero(values >= bound)
    if kept.size > count:
        equal = np.flatnonzero(values[kept] == bound)
        kept = np.delete(kept, equal[equal.size - (kept.size - count) :])
    return kept


def _pick(weights: np.ndarray, uniform: float) -> int:
    """Return the index where the running sum passes ``uniform`` times the total.

    Two levels, blocks and then one block, so that only a block is summed up one by one.
    """
    starts = np.arange(0, weights.size, _BLOCK)
    sums = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    point = uniform * sums[-1]
    block = min(int(np.searchsorted(sums, point, side="right")), len(starts) - 1)
    before = sums[block - 1] if block else 0.0
    inside = weights[starts[block] : starts[block] + _BLOCK]
    index = int(np.searchsorted(before + np.cumsum(inside, dtype=np.float64), point, side="right"))
    index = min(index, inside.size - 1)
    while index and inside[index] == 0.0:  # rounding never picks what has no weight
        index -= 1
    return int(starts[block]) + index
