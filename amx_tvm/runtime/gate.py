"""Calls of a GPU by several engines of a process: many at a time, or one that records a CUDA graph.

While a stream is recorded, CUDA refuses copies, allocations and launches of every thread, and the
recording fails with them. A compiled function records at its first call, so that call is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any


class Gate:
    """Lets in any number of calls, or a single one alone."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._inside = 0
        self._alone = False

    def enter(self) -> None:
        """Come in with others, until `leave`."""
        with self._condition:
            while self._alone:
                self._condition.wait()
            self._inside += 1

    def leave(self) -> None:
        """Go out again."""
        with self._condition:
            self._inside -= 1
            if self._alone:  # somebody waits for the last one to go
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the gate without anybody else; those who come meanwhile wait."""
        with self._condition:
            self._condition.wait_for(lambda: not self._alone)
            self._alone = True
            self._condition.wait_for(lambda: self._inside == 0)
        try:
            yield
        finally:
            with self._condition:
                self._alone = False
                self._condition.notify_all()

    def guarded(self, call: Callable[..., Any], records: bool = False) -> Callable[..., Any]:
        """Return the call through the gate; one that records is alone the first time.

        A step makes some ten calls: two locks each are all that they pay.
        """
        fresh = records

        def run(*arguments: Any) -> Any:
            nonlocal fresh
            if fresh:
                with self.alone():
                    result = call(*arguments)
                fresh = False
                return result
            self.enter()
            try:
                return call(*arguments)
            finally:
                self.leave()

        return run


GPU = Gate()  # of the process
