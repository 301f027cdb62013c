"""A linear's result quantized in the parallel region that makes it, for the linear that reads it.

    in one parallel region, for a few rows of x
        for each tile of W, shared out to the threads: y
        all threads wait for each other
        for each row of y, dealt out to the threads: codes, scales, sums, outliers

So no thread waits while another quantizes.  Rows are dealt out rather than columns: of a row's
scales and sums threads would share every cache line, and between cores without a common cache each
write to such a line waits for the other core (o projection of 8 rows of 576: 29 us against 18).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..spec import LinearSpec
from . import emit as e
from .activations import emit_quantize, quantize_row
from .emit import Expr

MOST_ROWS = 16  # more rows are quantized behind the linear, in a region of their own


def supports(spec: LinearSpec) -> bool:
    """Whether a linear's kernel can quantize its result."""
    return (
        spec.follow is not None
        and spec.m is None
        and not spec.experts
        and spec.format != "none"
        and spec.activation != "float32"
        and spec.follow.prologue in ("none", "rms_norm")
    )


class Follow:
    """Emits what follows a linear.

    Parameters
    ----------
    spec : LinearSpec
        With ``follow``.
    buffers : mapping
        The linear's arguments.
    m : Expr
        Rows of x.
    """

    def __init__(self, spec: LinearSpec, buffers: dict[str, Any], m: Expr):
        f = spec.follow
        assert f is not None
        self.m = m
        named = {name: buffers[f"next_{name}"] for name, _, _ in spec.next_buffers()}
        named["x"] = buffers["y"]
        if f.prologue == "rms_norm":
            named["weight"] = buffers["next_weight"]
        self.what = (named, spec.out_features, f.scheme, f.prologue, f.eps)

    def region(self, linear: Callable[[], None]) -> None:
        """Emit the region; ``linear`` emits the parallel loop over tiles."""
        with e.region():
            with e.barrier_behind():
                linear()
            with e.when(self.m <= MOST_ROWS), e.then(), e.parallel(0, self.m) as row:
                e.expect_row(self.what[0], row)
                quantize_row(row, *self.what)

    def behind(self) -> None:
        """Emit the quantization of many rows, as a pass of its own."""
        with e.when(self.m > MOST_ROWS), e.then():
            emit_quantize(self.m, *self.what)
