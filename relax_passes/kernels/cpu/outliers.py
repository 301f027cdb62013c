"""The second byte of activation codes, which only groups with outliers have (scheme int8-outliers).

    x = scale * (codes + codes_low / 256)    in the groups that ``outliers`` lists
    x = scale * codes                        elsewhere, where codes_low and sums_low are not set
    outliers int32 [M, 1 + G]                how many groups, then their numbers

A few channels of a row are often far above the rest and would leave their neighbours in the group
a few of the 255 steps.  Groups with a value above five times the row's quadratic mean get the
second byte: on SmolLM2 that is every eighth group, and the logits are as near as with 16-bit codes
for all inputs of the normalized kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import emit as e
from .emit import Expr

FACTOR = 5.0
LOW_STEPS = 256  # of codes_low in one of codes


def list_groups(listed: Any, row: Expr, groups: int, holds: Callable[[Expr], Expr]) -> None:
    """List the groups of a row for which ``holds(group)`` is 1; it is 0 for the others."""
    count = e.Register("int32", 1, e.const(0))
    with e.serial(0, groups) as group:
        # Every group takes the next place of the list; the following one may overwrite it.
        place = e.let(count.get())
        e.store(listed, group, row, place + 1)
        count.set(place + holds(group))
    e.store(listed, count.get(), row, 0)


@contextmanager
def listed_groups(listed: Any, row: Expr) -> Iterator[Expr]:
    """Open a loop over the groups in which a row has second bytes, by the list of groups."""
    with e.serial(0, e.let(e.load(listed, row, 0))) as i:
        yield e.let(e.load(listed, row, i + 1))


class ListedGroups:
    """Walks a row's list beside a loop over all its groups."""

    def __init__(self, listed: Any, row: Expr):
        self.listed, self.row = listed, row
        self.count = e.let(e.load(listed, row, 0))
        self.done = e.Register("int32", 1, e.const(0))
        self.following = e.Register("int32", 1)
        self._step()

    def _step(self) -> None:
        """Look up the next listed group; -1 behind the last."""
        done = self.done.get()
        with e.when(done < self.count):
            with e.then():
                self.following.set(e.load(self.listed, self.row, done + 1))
            with e.otherwise():
                self.following.set(e.const(-1))

    @contextmanager
    def when(self, group: Expr) -> Iterator[None]:
        """Open what is done where ``group`` is listed."""
        with e.when(group == self.following.get()), e.then():
            yield
            self.done.set(self.done.get() + 1)
            self._step()
