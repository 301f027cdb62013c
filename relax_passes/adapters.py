"""LoRA adapters that stay apart from the weights: y = x W^T + (x A^T) B^T, A and B by row of x.

What the pass, its kernels and whoever packs the parameters agree on. A product of several merged
weights (q, k, v) has several parts: each has an A of its own, and rows of W meet the B of theirs.

    down  [adapters, tiles of 16 of all parts' A rows, K, 16]
    up    [adapters, tiles of 16 of W's rows, width, 16]      the factor alpha / r is in it

A row's products with all A's are t [tiles * 16]; a tile of W's rows reads ``width`` of them, those
of its part. Where a tile holds rows of two parts, ``width`` is all parts' and the rest zero.
Adapters of a lower rank, and parts that an adapter leaves alone, are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

LANES = 16


@dataclass(frozen=True)
class AdapterPlan:
    """Which weights have adapters.

    Attributes
    ----------
    count : int
        How many adapters there are.
    ranks : mapping of str to int
        By weight, as the module calls it: the largest rank of any of them.
    rows : mapping of str to int
        By weight: its rows, of all weights that a linear may have.
    dtype : str
        What A and B are kept as: "float16" or "float32".
    """

    count: int
    ranks: Mapping[str, int]
    rows: Mapping[str, int]
    dtype: str = "float16"

    def rank(self, sources: Sequence[str]) -> int:
        """Return the largest rank of merged weights; 0 where none has an adapter."""
        return max((self.ranks.get(name, 0) for name in sources), default=0)


@dataclass(frozen=True)
class Parts:
    """How the rows of a merged weight are divided.

    Attributes
    ----------
    sizes : tuple of int
        Rows of each part.
    rank : int
        Rows of A of each.
    interleaved : bool
        Tiles of the first and of the second half alternate; see ``Recipe.interleave``.
    """

    sizes: tuple[int, ...]
    rank: int
    interleaved: bool = False

    @property
    def n(self) -> int:
        """Rows of the weight."""
        return sum(self.sizes)

    @property
    def tiles(self) -> int:
        """Tiles of its rows."""
        return -(-self.n // LANES)

    @property
    def down_tiles(self) -> int:
        """Tiles of all parts' rows of A."""
        return -(-self.rank * len(self.sizes) // LANES)

    @property
    def apart(self) -> bool:
        """Whether every tile belongs to one part."""
        if self.interleaved and len(self.sizes) == 2:
            return self.sizes[0] == self.sizes[1]
        return all(size % LANES == 0 for size in self.sizes[:-1]) and not (
            self.interleaved and len(self.sizes) > 1
        )

    @property
    def width(self) -> int:
        """How many products with rows of A a tile reads."""
        return self.rank * (1 if self.apart else len(self.sizes))

    def starts(self) -> list[int]:
        """Return the first tile of every part but the first, where tiles belong to one."""
        ends = list(accumulate(self.sizes))[:-1]
        return [end // LANES for end in ends] if self.apart and not self.interleaved else []

    def down_shape(self, count: int, k: int) -> tuple[int, ...]:
        """Return the shape of what is kept of A."""
        return (count, self.down_tiles, k, LANES)

    def up_shape(self, count: int) -> tuple[int, ...]:
        """Return the shape of what is kept of B."""
        return (count, self.tiles, self.width, LANES)

    def down(self, given: Sequence[np.ndarray | None], k: int) -> np.ndarray:
        """Pack one adapter's A's [r, K], one a part: float32 [down_tiles, K, 16]."""
        rows = np.zeros((self.down_tiles * LANES, k), np.float32)
        for part, a in enumerate(given):
            if a is not None:
                rows[part * self.rank : part * self.rank + len(a)] = a
        return rows.reshape(-1, LANES, k).transpose(0, 2, 1)

    def up(self, given: Sequence[np.ndarray | None], order: np.ndarray | None) -> np.ndarray:
        """Pack one adapter's B's [n, r], one a part: float32 [tiles, width, 16].

        ``order`` is that of the weight's rows where they are interleaved.
        """
        rows = np.zeros((self.n, self.width), np.float32)
        for (first, size, column), b in zip(self._places(), given, strict=True):
            if b is not None:
                rows[first : first + size, column : column + b.shape[1]] = b
        rows = rows if order is None else rows[order]
        padded = np.zeros((self.tiles * LANES, self.width), np.float32)
        padded[: self.n] = rows
        return padded.reshape(-1, LANES, self.width).transpose(0, 2, 1)

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """Yield the first row, the rows and the first column of every part's B."""
        first = 0
        for part, size in enumerate(self.sizes):
            yield first, size, 0 if self.apart else part * self.rank
            first += size
