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
from amx_tvm.runtime.vm import VirtualMachine

SIZES = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
MOST = SIZES[-1]
_EMPTY = -2  # in a mailbox: no token has arrived; -1 is a token of broken logits
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
        With the functions ``begin_greedy`` and ``decode_greedy``, for many rows ``begin_each`` and
        ``decode_each``.
    parameters : object
        The parameter tuple on the device.
    """

    def __init__(self, machine: VirtualMachine, parameters: Any):
        self._machine, self._parameters = machine, parameters
        self._rows = 0  # of the step that was started last
        self._awaited = 0  # rows of the step before it
        self._tokens: Any = None  # the device's, of the step that was started last
        self._begin_one = machine.function("begin_greedy")
        self._decode_one = machine.function("decode_greedy")
        self._begin_each: Any = None
        self._each: dict[int, Any] = {}  # functions by padded rows, since each records a graph
        self._continued: dict[int, Any] = {}  # rows that all go on: what they start from
        self._staged = 0
        self._copy = machine.builtin("runtime.TVMTensorCopyFromTo")
        self._mail_one = self._mail = machine.mailbox(1)

    def start(self, tokens: Sequence[int], arguments: tuple) -> None:
        """Start a step with tokens of the host's; nothing may be under way."""
        rows, machine = len(tokens), self._machine
        if rows == 1:
            noted = self._begin_one(*arguments)
            given = machine.to_device(np.array(tokens, np.int32))
            machine.to_host(noted)  # waits
            self._tokens = self._decode_one(given, *arguments, self._parameters)
        else:
            function = self._function(rows)
            noted = self._begin_each(machine.shape([padded(rows)]), *arguments)
            machine.to_host(noted)
            given = self._upload(tokens)
            self._tokens = function(given, self._none, *arguments, self._parameters)
        self._rows = rows

    def follow(self, arguments: tuple, going: Sequence[int] = (0,)) -> None:
        """Start the step behind the one under way, of those of its rows that go on.

        `wait` then gives the tokens between the two.
        """
        self._awaited, rows = self._rows, len(going)
        if self._awaited == 1:
            self._begin_one(*arguments)
            self._post(self._mail_one)
            self._tokens = self._decode_one(self._tokens, *arguments, self._parameters)
            return
        function = self._function(rows)
        self._begin_each(self._machine.shape([padded(rows)]), *arguments)
        self._post(self._mail_each)
        if rows == self._awaited and going[-1] == rows - 1:
            given = self._continued.get(rows)
            if given is None:
                given = self._continued[rows] = self._machine.to_device(_padding(range(rows)))
        else:
            given = self._upload([-1 - row for row in going])
        self._tokens = function(given, self._tokens, *arguments, self._parameters)
        self._rows = rows

    def can_follow(self, rows: int) -> bool:
        """Whether so many rows of the step under way can be followed: one alone starts afresh."""
        return rows > 1 or (rows == 1 and self._rows == 1)

    def wait(self) -> list[int]:
        """Return the tokens that the last `follow` started from, of all rows of that step."""
        mail, limit = self._mail[1], time.monotonic() + _PATIENCE
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
        return self._machine.to_host(self._tokens)[: self._rows].tolist()

    def _look(self, limit: float) -> None:
        if time.monotonic() > limit:
            self.finish()
            raise GenerationError("the GPU gave no token for a minute")

    def _post(self, mail: tuple[Any, np.ndarray]) -> None:
        """Have the tokens of the step under way copied to the host."""
        self._mail = mail
        mail[1][: self._awaited] = _EMPTY
        self._copy(self._tokens, mail[0])

    def _function(self, rows: int) -> Any:
        """Return ``decode_each`` for a number of rows."""
        machine, size = self._machine, padded(rows)
        if self._begin_each is None:
            self._begin_each = machine.function("begin_each")
            self._mail_each = machine.mailbox(MOST)
            self._none = machine.to_device(np.zeros(MOST, np.int32))
            # Copies of a step may still wait when the next one's is staged.
            self._stages = [machine.mailbox(MOST) for _ in range(4)]
            self._given = machine.to_device(np.zeros(MOST, np.int32))
        if size not in self._each:
            self._each[size] = machine.function("decode_each")
        return self._each[size]

    def _upload(self, values: Sequence[int]) -> Any:
        """Return ids, or references to the step before, as a tensor of the padded rows."""
        self._staged = (self._staged + 1) % len(self._stages)
        tensor, view = self._stages[self._staged]
        view[: len(values)] = values
        view[len(values) :] = 0
        self._copy(tensor, self._given)
        return self._machine.view(self._given, [padded(len(values))])


def _padding(rows: range) -> np.ndarray:
    """Return what continues rows of the step before, padded with a valid id."""
    given = np.zeros(padded(len(rows)), np.int32)
    given[: len(rows)] = [-1 - row for row in rows]
    return given
