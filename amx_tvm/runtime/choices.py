"""What a GPU needs to choose a token for every row by the row's own settings: one array a step.

The device holds tables (device_tables.py), and the host gives it one record a row:

    counts   int32 [slots, vocab]     what a sequence with penalties has seen: how often a token was
                                      chosen, the sign where the prompt has it; the device counts
    masks    int32 [slots, vocab/32]  tokens that may be chosen, a bit each: `mask_words`
    biases   int32 [entries, 2]       of all sequences, a list each: `bias_entries`
    options  int32 [rows, WORDS]      `pack`, a step

Every step uploads `pack([...], rows)`; a row without a request is all zeros. The uniform number of
a draw comes from the request's own generator, so a seed gives the CPU's stream of draws. A step
that is thrown away has taken a number of it; nothing else of a request changes by one.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from enum import IntFlag

import numpy as np

from amx_tvm.runtime.options import Sampling

CHOICE = np.dtype(
    [
        ("uniform", "<f8"),  # of this step, in [0, 1)
        ("top_p", "<f8"),  # 1 keeps all
        ("flags", "<i4"),
        ("top_k", "<i4"),  # 0 keeps all
        ("counts", "<i4"),  # which table of counts
        ("mask", "<i4"),  # which mask
        ("bias_first", "<i4"),  # where its list of biases begins
        ("bias_count", "<i4"),
        ("logprobs", "<i4"),  # so many most likely tokens; -1 notes nothing
        ("inverse_temperature", "<f4"),
        ("min_p", "<f4"),
        ("repetition_penalty", "<f4"),
        ("presence_penalty", "<f4"),
        ("frequency_penalty", "<f4"),
    ]
)
WORDS = CHOICE.itemsize // 4
ROWS = 256  # of a step, at most
BROKEN, NOTHING = -1, -2  # tokens of rows whose logits are broken, whose mask leaves nothing
_SMALLEST = float(np.finfo(np.float32).tiny)


class Flag(IntFlag):
    """What a row's choice takes."""

    LIVE = 1  # a request has the row
    DRAWS = 2
    PENALIZES = 4
    BIASED = 8
    MASKED = 16


class RowChoice:
    """A request's settings as the record of its row, and its draws.

    Parameters
    ----------
    sampling : Sampling
        What to do.
    random : numpy.random.Generator or None
        The request's own, as `sampler.Sampler` makes it; of meaning where tokens are drawn.
    prompt, made : sequence of int
        Its tokens: what it was given, and the list that grows by what is chosen.

    Attributes
    ----------
    noted : int
        How many chosen tokens its table of counts has, those of steps under way included.
    """

    def __init__(
        self,
        sampling: Sampling,
        random: np.random.Generator | None,
        prompt: Sequence[int] = (),
        made: Sequence[int] = (),
    ):
        self.sampling, self.prompt, self.made = sampling, prompt, made
        self.noted = -1
        flags = Flag.LIVE
        if sampling.draws:
            flags |= Flag.DRAWS
        if sampling.penalizes:
            flags |= Flag.PENALIZES
        if sampling.logit_bias:
            flags |= Flag.BIASED
        record = self._record = np.zeros((), CHOICE)
        record["top_p"], record["min_p"] = sampling.top_p, sampling.min_p
        record["top_k"] = min(sampling.top_k, 2**31 - 1)
        record["bias_count"] = len(sampling.logit_bias)
        record["logprobs"] = -1 if sampling.logprobs is None else sampling.logprobs
        if sampling.draws:
            record["inverse_temperature"] = max(1.0 / sampling.temperature, _SMALLEST)
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            record[name] = getattr(sampling, name)
        self._random = random if sampling.draws else None
        record["flags"] = flags
        self._tail = record.tobytes()[8:]  # all but the uniform number, which comes first

    def place(self, name: str, where: int) -> None:
        """Note where its table of "counts" is, or where its list of biases begins: "bias_first"."""
        if self._record[name] != where:
            self._record[name] = where
            self._tail = self._record.tobytes()[8:]

    def record(self, mask: int | None = None) -> bytes:
        """Return the record of the next step; takes the next number of the generator.

        Parameters
        ----------
        mask : int, optional
            Only what this mask allows may be chosen.
        """
        self.noted += 1
        uniform = self._random.random() if self._random is not None else 0.0
        tail = self._tail
        if mask is not None:
            masked = self._record.copy()
            masked["mask"], masked["flags"] = mask, masked["flags"] | Flag.MASKED
            tail = masked.tobytes()[8:]
        return struct.pack("<d", uniform) + tail


GREEDY = RowChoice(Sampling(), None)  # the most likely token, of any request


def serves(sampling: Sampling, clusters: bool, masked: bool = False) -> bool:
    """Whether a GPU can choose by these settings; with clusters (from sm_90 on) by any.

    Elsewhere bias, penalties and masks change the logits in place, and log-probabilities, which
    come before them, cannot be told any more.
    """
    changes = sampling.penalizes or sampling.logit_bias or masked
    return clusters or sampling.logprobs is None or not changes


def pack(records: Sequence[bytes], rows: int) -> np.ndarray:
    """Return the options of a step, int32 [rows, WORDS]; rows beyond the records are empty."""
    missing = rows - len(records)
    if missing < 0:
        raise ValueError(f"{len(records)} records for {rows} rows")
    data = b"".join(records) + bytes(missing * CHOICE.itemsize)
    return np.frombuffer(data, "<i4").reshape(rows, WORDS)


def mask_words(vocab: int, allowed: np.ndarray | None, banned: Collection[int] = ()) -> np.ndarray:
    """Return a mask, int32 [ceil(vocab / 32)]: token t is bit t % 32 of word t / 32.

    Parameters
    ----------
    vocab : int
        Tokens.
    allowed : ndarray or None
        bool [vocab]; None allows all.
    banned : collection of int
        Tokens that may not be chosen all the same.
    """
    bits = np.zeros(-(-vocab // 32) * 32, bool)
    bits[:vocab] = True if allowed is None else allowed
    bits[list(banned)] = False
    return np.packbits(bits, bitorder="little").view("<i4")


def bias_entries(logit_bias: Mapping[int, float]) -> np.ndarray:
    """Return a list of biases, int32 [n, 2]: tokens, and the bits of float32 values."""
    entries = np.empty((len(logit_bias), 2), "<i4")
    entries[:, 0] = list(logit_bias)
    entries[:, 1] = np.array(list(logit_bias.values()), "<f4").view("<i4")
    return entries
