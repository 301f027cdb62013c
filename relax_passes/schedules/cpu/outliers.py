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

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import emit as e
from .emit import Expr

FACTOR = 5.0
LOW_STEPS = 256  # of codes_low in one of codes


@contextmanager
def listed_groups(listed: Any, row: Expr) -> Iterator[Expr]:
    """Open a loop over the groups in which a row has second bytes, by the list of groups."""
    with e.serial(0, e.let(e.load(listed, row, 0))) as i:
        yield e.let(e.load(listed, row, i + 1))
