"""Four over six: each scale of an activation is its rule's, or the one that puts the largest at 4.

E2M1 has nothing between 4 and 6, so a group whose values lie close under its largest is rounded
better when that largest becomes 4 instead of 6. The scale of either kind with the smaller squared
error is taken (6 where they are equal), for each sign apart where a group has a pair. Nothing in
the stored form says so: only what is chosen differs. Source: arXiv 2512.02010, for NVFP4.

``four_over_six(get("amxfp4"))`` is amxfp4 with this choice, for activations; weights have recipes
that search more scales, and better.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from amx_tvm.errors import FormatError
from amx_tvm.formats.base import Format
from amx_tvm.formats.blocks import Block

SUFFIX = "+46"  # of the name
STRETCH = np.float32(1.5)  # largest / 6 becomes largest / 4


class FourOverSix(Format):
    """A format of E2M1 elements under the better of two scales.

    Raises
    ------
    FormatError
        For a format of other elements.
    """

    four_over_six = True

    def __init__(self, base: Format) -> None:
        if base.rule is None:
            raise FormatError(
                f"four over six is a choice of E2M1 scales, which {base.name} does not have"
            )
        self.base, self.rule = base, base.rule
        self.name, self.title = base.name + SUFFIX, base.title + ", four over six"
        self.group_size, self.code_bits = base.group_size, base.code_bits
        self.scale_tensors, self.terms = base.scale_tensors, base.terms
        self.row_scaled = base.row_scaled

    def tensor_scale_of(self, largest: np.ndarray) -> np.ndarray:
        """float32 tensor scale for a largest magnitude, by the scale rule."""
        return self.base.tensor_scale_of(largest)

    def group_scales(
        self, high: np.ndarray, depth: np.ndarray, tensor_scale: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Stored scales by the rule alone: the choice needs the values."""
        return self.base.group_scales(high, depth, tensor_scale)

    def encode(
        self,
        values: np.ndarray,
        scales: Mapping[str, np.ndarray],
        tensor_scale: np.ndarray | None = None,
    ) -> np.ndarray:
        """Codes under given stored scales."""
        return self.base.encode(values, scales, tensor_scale)

    def decode(
        self,
        codes: np.ndarray,
        scales: Mapping[str, np.ndarray],
        tensor_scale: np.ndarray | None = None,
    ) -> np.ndarray:
        """float32 values of codes and stored scales."""
        return self.base.decode(codes, scales, tensor_scale)

    @np.errstate(over="ignore", invalid="ignore")  # of groups that hold Inf
    def _quantize_block(
        self, block: Block, row_scale: np.ndarray | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        six = self.group_scales(block.high, block.depth, row_scale)
        four = self.group_scales(block.high * STRETCH, block.depth * STRETCH, row_scale)
        of_six = self._errors(block.values, six, row_scale)
        of_four = self._errors(block.values, four, row_scale)
        chosen = {k: np.where(of_four[k] < of_six[k], four[k], six[k]) for k in six}
        return chosen, self.encode(block.values, chosen, row_scale)

    def _errors(
        self, values: np.ndarray, scales: dict[str, np.ndarray], row_scale: np.ndarray | None
    ) -> dict[str, Any]:
        """Squared error of the values that each scale is responsible for."""
        codes = self.encode(values, scales, row_scale)
        squares = np.square(self.decode(codes, scales, row_scale) - values)
        if len(scales) == 1:
            return dict.fromkeys(scales, squares.sum(axis=-1))
        own = values > 0
        return {
            "positive": np.where(own, squares, 0).sum(axis=-1),
            "negative": np.where(own, 0, squares).sum(axis=-1),
        }


@cache
def four_over_six(base: Format) -> FourOverSix:
    """Return a format with this choice of scales, one for each format."""
    return FourOverSix(base)
