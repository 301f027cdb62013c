"""Decode steps whose tokens the device chooses, with the next step under way while the host looks.

The host needs as long to start a step as a small model needs to compute it, and as long to look at
a batch's tokens as a GPU needs for the next ones. So step k + 1 starts, from the tokens that the
device itself chose in step k, before the host has read those:

    begin k | decode k | begin k + 1 | copy of tokens k to the host | decode k + 1 ...

`begin` notes the page tables of its step in device memory; TVM's cache copies them from the host on
a stream of its own. The next tables may be copied only when that note has been taken, and it has
once a token that was copied behind it has arrived. The very first step waits instead.

One row has functions of its own; more are padded to one of `SIZES`, each a CUDA graph that is
recorded when it is first met.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.choices import ROWS, WORDS, RowChoice, pack
from amx_tvm.runtime.device_tables import DeviceTables
from amx_tvm.runtime.options import MOST_LOGPROBS
from amx_tvm.runtime.result import TokenLogprobs
from amx_tvm.runtime.vm import VirtualMachine

SIZES = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_EMPTY = -(2**31)  # in a mailbox: no token has arrived
_PATIENCE = 60.0  # seconds without a token, after which the device is asked for its error
_NAP = 3e-5  # seconds between two looks for the tokens of a batch


def padded(rows: int) -> int:
    """Return the number of rows that a step of some rows is padded to."""
    return SIZES[bisect_left(SIZES, rows)]


class DeviceSteps:
    """Starts steps and waits for their tokens; at most one step is ahead of the host.

    Parameters
    ----------
    machine : VirtualMachine
        With the functions ``begin_one`` and ``decode_one``, for many rows ``begin_each`` and
        ``decode_each``.
    parameters : object
        The parameter tuple on the device.
    vocab : int
        Number of logits of a row.
    """

    def __init__(self, machine: VirtualMachine, parameters: Any, vocab: int):
        self._machine, self._parameters = machine, parameters
        self._rows = 0  # of the step that was started last
        self._awaited = 0  # rows of the step before it
        self._tokens: Any = None  # the device's, of the step that was started last
        self._begin_one = machine.function("begin_one")
        self._decode_one = machine.function("decode_one")
        self._begin_each: Any = None
        self._each: dict[int, Any] = {}  # functions by padded rows, since each records a graph
        self._continued: dict[int, Any] = {}  # rows that all go on: what they start from
        self._staged = self._uploads = 0
        self._copy = machine.builtin("runtime.TVMTensorCopyFromTo")
        self._mail = machine.mailbox(ROWS)
        # Copies of a step may still wait when the next one's is staged.
        self._stages = [machine.mailbox(ROWS) for _ in range(4)]
        self._given = machine.to_device(np.zeros(ROWS, np.int32))
        self._none = machine.to_device(np.zeros(ROWS, np.int32))
        self._records = [machine.mailbox(ROWS, WORDS) for _ in range(4)]
        self._options = machine.to_device(np.zeros((ROWS, WORDS), np.int32))
        self._held = b""  # the records that the device has
        self._tables = DeviceTables(machine, vocab)
        self._noted: Any = ()  # log-probabilities of that step, on the device
        self._asks = self._asked = False  # whether a row of it, of the one before, wants them
        self._letter: Any = None  # where they arrive
        self._told: tuple[np.ndarray, np.ndarray] | None = None  # of the tokens returned last

    def start(
        self,
        tokens: Sequence[int],
        choices: Sequence[RowChoice],
        arguments: tuple,
        masks: Sequence[np.ndarray | None] = (),
    ) -> None:
        """Start a step with tokens of the host's; nothing may be under way.

        Parameters
        ----------
        tokens : sequence of int
            A token of each row.
        choices : sequence of RowChoice
            How each row's next token is chosen.
        arguments : tuple
            What the cache gives for the step.
        masks : sequence of ndarray or None
            What each row may choose: `choices.mask_words`, None for anything.
        """
        rows, machine = len(tokens), self._machine
        self._tables.place(choices)
        slots = self._tables.allow(masks or [None] * rows)
        self._choose(choices, [c.record(s) for c, s in zip(choices, slots, strict=True)])
        if rows == 1:
            noted = self._begin_one(*arguments)
            given = machine.to_device(np.array(tokens, np.int32))
            machine.to_host(noted)  # waits
            self._run(self._decode_one, given, arguments)
        else:
            function = self._function(rows)
            noted = self._begin_each(machine.shape([padded(rows)]), *arguments)
            machine.to_host(noted)
            given = self._upload(tokens)
            self._run(function, given, arguments, self._none)
        self._rows = rows

    def follow(self, going: Sequence[int], choices: Sequence[RowChoice], arguments: tuple) -> None:
        """Start the step behind the one under way, of those of its rows that go on.

        `wait` then gives the tokens between the two.
        """
        self._awaited, rows = self._rows, len(going)
        if self._awaited == 1:
            self._begin_one(*arguments)
            self._post()
            self._choose(choices, [choice.record() for choice in choices])
            self._run(self._decode_one, self._machine.view(self._tokens, [1]), arguments)
            return
        function = self._function(rows)
        self._begin_each(self._machine.shape([padded(rows)]), *arguments)
        self._post()
        self._choose(choices, [choice.record() for choice in choices])
        if rows == self._awaited and going[-1] == rows - 1:
            given = self._continued.get(rows)
            if given is None:
                given = self._continued[rows] = self._machine.to_device(_padding(range(rows)))
        else:
            given = self._upload([-1 - row for row in going])
        self._run(function, given, arguments, self._tokens)
        self._rows = rows

    def can_follow(self, rows: int) -> bool:
        """Whether so many rows of the step under way can be followed: one alone starts afresh."""
        return rows > 1 or (rows == 1 and self._rows == 1)

    def wait(self) -> list[int]:
        """Return the tokens that the last `follow` started from, of all rows of that step."""
        mail, limit = self._mail[1], time.monotonic() + _PATIENCE
        self._told = (self._letter[0][1], self._letter[1][1]) if self._asked else None
        if self._awaited == 1:
            while mail[0] == _EMPTY:
                self._look(limit)
            return [int(mail[0])]
        mail = mail[: self._awaited]
        while (mail == _EMPTY).any():
            self._look(limit)
            time.sleep(_NAP)
        return mail.tolist()

    def finish(self) -> list[int]:
        """Wait for everything that was started and return the last tokens."""
        tokens = self._machine.to_host(self._tokens)[: self._rows].tolist()
        if self._asks:
            ids, values = (self._machine.to_host(part) for part in self._noted)
            self._told = ids, values
        return tokens

    def told(self, row: int, token: int, choice: RowChoice) -> int | TokenLogprobs:
        """Return a token of those returned last, with log-probabilities where its row asks."""
        count = choice.sampling.logprobs
        if count is None or token < 0 or self._told is None:
            return token
        ids, values = (part[row].tolist() for part in self._told)
        return TokenLogprobs(token, values[0], list(zip(ids, values[1 : 1 + count], strict=False)))

    def _run(self, function: Any, given: Any, arguments: tuple, *previous: Any) -> None:
        """Start a compiled step."""
        tables = self._tables.arguments
        found = function(given, *previous, self._options, *tables, *arguments, self._parameters)
        self._tokens, self._noted = found[0], (found[1], found[2])

    def _look(self, limit: float) -> None:
        if time.monotonic() > limit:
            self.finish()
            raise GenerationError("the GPU gave no token for a minute")

    def _post(self) -> None:
        """Have the tokens of the step under way copied to the host."""
        self._asked = self._asks
        if self._asked:  # they arrive before the tokens, which come behind them
            if self._letter is None:
                ids = self._machine.mailbox(ROWS, MOST_LOGPROBS)
                values = self._machine.mailbox(ROWS, 1 + MOST_LOGPROBS, dtype="float32")
                self._letter = ids, values
            for (letter, _), part in zip(self._letter, self._noted, strict=True):
                self._copy(part, letter)
        tensor, view = self._mail
        view[: self._awaited] = _EMPTY
        self._copy(self._tokens, tensor)

    def _choose(self, choices: Sequence[RowChoice], records: Sequence[bytes]) -> None:
        """Give the device the settings of the next step's rows, where it has others."""
        self._asks = any(choice.sampling.logprobs is not None for choice in choices)
        joined = b"".join(records)
        if joined != self._held:
            self._held, self._staged = joined, (self._staged + 1) % len(self._records)
            tensor, view = self._records[self._staged]
            view[:] = pack(records, ROWS)
            self._copy(tensor, self._options)

    def _function(self, rows: int) -> Any:
        """Return ``decode_each`` for a number of rows."""
        machine, size = self._machine, padded(rows)
        if self._begin_each is None:
            self._begin_each = machine.function("begin_each")
        if size not in self._each:
            self._each[size] = machine.function("decode_each")
        return self._each[size]

    def _upload(self, values: Sequence[int]) -> Any:
        """Return ids, or references to the step before, as a tensor of the padded rows."""
        self._uploads = (self._uploads + 1) % len(self._stages)
        tensor, view = self._stages[self._uploads]
        view[: len(values)] = values
        view[len(values) :] = 0
        self._copy(tensor, self._given)
        return self._machine.view(self._given, [padded(len(values))])


def _padding(rows: range) -> np.ndarray:
    """Return what continues rows of the step before, padded with a valid id."""
    given = np.zeros(padded(len(rows)), np.int32)
    given[: len(rows)] = [-1 - row for row in rows]
    return given
