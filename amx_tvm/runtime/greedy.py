"""Decode steps whose token the device chooses, with the next step under way while the host looks.

The host needs as long to start a step as a small model needs to compute it. So step k + 1 starts,
from the token that the device itself chose in step k, before the host has read that token:

    begin k | decode k | begin k + 1 | copy of token k to the host | decode k + 1 ...

`begin` notes the page table of its step in device memory; TVM's cache copies the table from the
host on a stream of its own. The next table may be copied only when that note has been taken, and
it has once a token that was copied behind it has arrived. The very first step waits instead.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.vm import VirtualMachine

_EMPTY = -2  # in the mailbox: no token has arrived; -1 is a token of broken logits
_PATIENCE = 60.0  # seconds without a token, after which the device is asked for its error


class GreedySteps:
    """Starts steps and waits for their tokens; at most one step is ahead of the host.

    Parameters
    ----------
    machine : VirtualMachine
        With the functions ``begin_greedy`` and ``decode_greedy``.
    parameters : object
        The parameter tuple on the device.
    """

    def __init__(self, machine: VirtualMachine, parameters: Any):
        self._machine, self._parameters = machine, parameters
        self._begin = machine.function("begin_greedy")
        self._decode = machine.function("decode_greedy")
        self._mailbox, self._mail = machine.mailbox()
        self._copy = machine.builtin("runtime.TVMTensorCopyFromTo")
        self._token: Any = None  # the device's token of the step that was started last

    def start(self, token: int, arguments: tuple) -> None:
        """Start a step with a token of the host's; nothing may be under way."""
        noted = self._begin(*arguments)
        tokens = self._machine.to_device(np.array([token], np.int32))
        self._machine.to_host(noted)  # waits
        self._token = self._decode(tokens, *arguments, self._parameters)

    def follow(self, arguments: tuple) -> None:
        """Start the step behind the one under way; `wait` then gives the token between them."""
        self._begin(*arguments)
        self._mail[0] = _EMPTY
        self._copy(self._token, self._mailbox)
        self._token = self._decode(self._token, *arguments, self._parameters)

    def wait(self) -> int:
        """Return the token that the last `follow` started from."""
        mail, limit = self._mail, time.monotonic() + _PATIENCE
        while mail[0] == _EMPTY:
            if time.monotonic() > limit:
                self.finish()
                raise GenerationError("the GPU gave no token for a minute")
        return int(mail[0])

    def finish(self) -> int:
        """Wait for everything that was started and return the last token."""
        return int(self._machine.to_host(self._token).item())
