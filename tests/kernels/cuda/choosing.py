"""The kernels that choose tokens, on the CPU and on the GPU, and rows to try them with."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.runtime import choices
from amx_tvm.runtime.options import Sampling
from amx_tvm.runtime.sampler import NothingAllowed, Sampler, logprobs

SLOTS = 8  # tables of counts and masks in tests
BIASES = 64


@dataclass
class Row:
    """What a row is tried with.

    Attributes
    ----------
    logits : ndarray
        float32 [vocab].
    sampling : Sampling
    prompt, made : list of int
        Tokens that penalties count.
    allowed : ndarray or None
    """

    logits: np.ndarray
    sampling: Sampling
    prompt: list[int] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    allowed: np.ndarray | None = None

    def sampler(self, seed: int) -> Sampler:
        """A sampler that has seen what the row has."""
        sampler = Sampler(self.sampling, self.prompt)
        sampler._random = np.random.default_rng(seed)
        if self.sampling.penalizes:
            for token in self.made:
                sampler._counts[token] = sampler._counts.get(token, 0) + 1
                if self.sampling.repetition_penalty != 1.0:
                    sampler._seen.add(token)
        return sampler

    def expected(self, seed: int) -> int:
        """The token that the CPU chooses."""
        try:
            return self.sampler(seed)(self.logits, self.allowed)
        except GenerationError as error:
            return choices.NOTHING if isinstance(error, NothingAllowed) else choices.BROKEN

    def explains(self, seed: int, token: int, tolerance: float = 3e-6) -> bool:
        """Whether rounding explains a token: the draw lies at its edge in the CPU's running sum.

        Tokens at the edge of what top-p or min-p keeps may be in on one side and out on the other;
        with one more or less of them the same must hold.
        """
        edited = self.sampler(seed)._change(self.logits, self.allowed, ())
        options, uniform = self.sampling, np.random.default_rng(seed).random()
        order = np.argsort(-edited, kind="stable")
        if options.top_k:
            order = order[: options.top_k]
        z = (edited[order].astype(np.float64) - float(edited[order[0]])) / options.temperature
        weights = np.exp(z)
        cut = len(order)
        if options.top_p < 1:
            cut = int(np.searchsorted(np.cumsum(weights), options.top_p * weights.sum())) + 1
        if options.min_p:
            cut = min(cut, int((weights >= options.min_p).sum()))
        for kept in {max(1, cut - 1), cut, min(cut + 1, len(order))}:
            tokens = np.sort(order[:kept])
            chances = np.exp(
                (edited[tokens].astype(np.float64) - edited.max()) / options.temperature
            )
            upto = np.cumsum(chances) / chances.sum()
            place = int(np.searchsorted(tokens, token))
            if place == len(tokens) or tokens[place] != token:
                continue
            before = upto[place - 1] if place else 0.0
            if before - tolerance <= uniform <= upto[place] + tolerance:
                return True
        return False


@dataclass
class Step:
    """The arrays of a step, as the kernels take them."""

    logits: np.ndarray
    options: np.ndarray
    counts: np.ndarray
    masks: np.ndarray
    biases: np.ndarray
    tokens: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """In the order of the kernel's arguments."""
        return (
            self.logits,
            self.options,
            self.counts,
            self.masks,
            self.biases,
            self.tokens,
        )


def pack(rows: list[Row], vocab: int, seed: int) -> Step:
    """Pack rows as a scheduler would; row i draws from generator seed + i."""
    counts = np.zeros((SLOTS, vocab), np.int32)
    masks = np.zeros((SLOTS, -(-vocab // 32)), np.int32)
    biases = np.zeros((BIASES, 2), np.int32)
    records, slot, mask, bias = [], 0, 0, 0
    for i, row in enumerate(rows):
        options = row.sampling
        random = np.random.default_rng(seed + i)
        choice = choices.RowChoice(options, random)
        choice.place("counts", slot)
        choice.place("bias_first", bias)
        records.append(choice.record(None if row.allowed is None else mask))
        if options.penalizes:
            np.add.at(counts[slot], row.made, 1)
            counts[slot, row.prompt] |= np.int32(-(2**31))
            slot += 1
        if row.allowed is not None:
            masks[mask] = choices.mask_words(vocab, row.allowed)
            mask += 1
        if options.logit_bias:
            entries = choices.bias_entries(options.logit_bias)
            biases[bias : bias + len(entries)] = entries
            bias += len(entries)
    return Step(
        np.stack([row.logits for row in rows]),
        choices.pack(records, choices.ROWS).copy(),
        counts,
        masks,
        biases,
        np.full(choices.ROWS, -9, np.int32),
    )


def samplings(rng: np.random.Generator, vocab: int) -> Sampling:
    """Settings of any kind."""
    pick: Callable = rng.choice
    return Sampling(
        temperature=float(pick([0.0, 1e-3, 0.3, 0.7, 1.0, 1.5, 40.0])),
        top_k=int(pick([0, 0, 1, 2, 7, 50, 1000, vocab - 1, vocab + 5])),
        top_p=float(pick([1.0, 1.0, 1e-4, 0.1, 0.5, 0.9, 0.95, 0.9999])),
        min_p=float(pick([0.0, 0.0, 0.0, 0.01, 0.3, 0.9])),
    )


def some_logits(rng: np.random.Generator, vocab: int, kind: int | None = None) -> np.ndarray:
    """Logits of one of 9 kinds: like a model's, flat, peaked, with ties, masked, huge."""
    kind = int(rng.integers(9)) if kind is None else kind
    x = rng.standard_normal(vocab).astype(np.float32) * np.float32(2)
    if kind == 1:  # a few stand out
        x[rng.integers(0, vocab, 20)] += rng.exponential(8, 20).astype(np.float32)
    elif kind == 2:  # many equals
        x = np.round(x * 2) / 2
    elif kind == 3:
        x[:] = rng.choice([-3.5, 0.0, 1.0])
    elif kind == 4:  # little is left
        x[rng.random(vocab) < 0.999] = -np.inf
    elif kind == 5:  # flat
        x *= np.float32(1e-4)
    elif kind == 6:
        x *= np.float32(1e4)
    elif kind == 7:  # equals at the top
        x[rng.integers(0, vocab, 9)] = np.float32(12)
    elif kind == 8:  # neighbours among floats
        x = 16 + rng.integers(0, 3000, vocab) * 2.0**-19
    return x.astype(np.float32)


def on_cpu(text: str, functions: str, folder: Path) -> ctypes.CDLL:
    """Build CUDA text for the CPU, its threads as fibers (fibers.h), and load it."""
    here = Path(__file__).parent
    (folder / "cuda_fp16.h").write_text("")
    source, out = folder / "text.cpp", folder / "text.so"
    source.write_text(f'#include "{here}/fibers.h"\n{text}\n{functions}\n')
    flags = ["-std=c++17", "-O2", "-w", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=0"]
    flags += ["-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", f"-I{folder}"]
    subprocess.run(["g++", *flags, "-o", out, source], check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(out))


def team_on_cpu(vocab: int, splits: int, folder: Path) -> ctypes.CDLL:
    """The kernels of a vocabulary on the CPU: choose and logprobs, row by row."""
    from relax_passes.kernels.cuda.choose.kernels import THREADS as threads  # noqa: N811
    from relax_passes.kernels.cuda.choose.row_text import ROW

    team, where = f"{vocab}, {splits}, {threads}", f"i / {threads}, i % {threads}"
    functions = f"""
extern "C" void choose(int m, float* logits, int* options, int* counts, int* masks, int* biases,
                       int* tokens) {{
  for (int row = 0; row < m; ++row)
    run_team({splits}, {threads}, [=](int i) {{
      amx_choose<{team}, false>(shared_of(i / {threads}), logits, options, counts, masks, biases,
                                tokens, row, {where});
    }});
}}
extern "C" void logprobs(int m, float* logits, int* options, int* tokens, int* ids,
                         float* values) {{
  for (int row = 0; row < m; ++row)
    run_team({splits}, {threads}, [=](int i) {{
      amx_logprobs<{team}>(shared_of(i / {threads}), logits, options, tokens, ids, values, row,
                           {where});
    }});
}}
"""
    return on_cpu(ROW.full_text, functions, folder)


def pointers(*arrays: np.ndarray) -> list[ctypes.c_void_p]:
    """Addresses of arrays."""
    return [a.ctypes.data_as(ctypes.c_void_p) for a in arrays]


def edited_rows(rng: np.random.Generator, vocab: int) -> list[Row]:
    """Rows with penalties, biases, masks, broken logits and nothing allowed."""

    def logits(kind: int = 1) -> np.ndarray:
        return some_logits(rng, vocab, kind)

    def tokens(count: int) -> list[int]:
        return rng.integers(0, vocab, count).tolist()

    bias = dict(zip(tokens(9), rng.uniform(-100, 100, 9).tolist(), strict=True))
    one = logits()
    penalized = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.3}
    favourite = [int(one.argmax())] * 4
    rows = [
        Row(one, Sampling(**penalized), tokens(200), [*tokens(50), *favourite]),
        Row(one, Sampling(temperature=1.0, top_p=0.9, **penalized), tokens(200), favourite),
        Row(logits(), Sampling(logit_bias=bias)),
        Row(logits(), Sampling(temperature=0.8, top_k=20, logit_bias=bias)),
        Row(logits(), Sampling(temperature=1.0), allowed=rng.random(vocab) < 0.3),
        Row(
            logits(),
            Sampling(temperature=1.0, top_p=0.5, logit_bias=bias, **penalized),
            tokens(99),
            tokens(99),
            rng.random(vocab) < 0.5,
        ),
        Row(logits(), Sampling(), allowed=np.zeros(vocab, bool)),
    ]
    for value in (np.nan, np.inf):
        for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9)):
            rows.append(Row(logits(), sampling))
            rows[-1].logits[int(rng.integers(vocab))] = value
    rows.append(Row(np.full(vocab, -np.inf, np.float32), Sampling()))
    return rows


def counts_after(step: Step, rows: list[Row], tokens: np.ndarray) -> np.ndarray:
    """Tables of counts once these tokens were chosen."""
    counts, slot = step.counts.copy(), 0
    for row, token in zip(rows, tokens, strict=False):
        if row.sampling.penalizes:
            if token >= 0:
                counts[slot, token] += 1
            slot += 1
    return counts


def check_logprobs(
    rows: list[Row], tokens: np.ndarray, ids: np.ndarray, values: np.ndarray
) -> None:
    """Compare noted log-probabilities; rows that asked for none were NaN and stay so."""
    for row, token, best, noted in zip(rows, tokens, ids, values, strict=False):
        count = row.sampling.logprobs
        if count is None or token < 0:
            assert np.isnan(noted).all()
            continue
        expected = logprobs(row.logits, int(token), count)
        assert best[: len(expected.top)].tolist() == [token for token, _ in expected.top]
        wanted = np.array([expected.logprob, *[value for _, value in expected.top]])
        np.testing.assert_allclose(noted[: len(wanted)], wanted, atol=2e-5, rtol=1e-6)
