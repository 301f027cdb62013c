"""A space of one knob, and records' fields for its points."""

from __future__ import annotations

from tuning.decisions import trace_of
from tuning.spaces import Space

PREFETCH = Space({"prefetch": (512, 1024, 2048, 4096, 8192)}, {"prefetch": 4096}, (1,))


def edit(prefetch):
    return {"knobs": {"prefetch": prefetch}, "trace": trace_of(PREFETCH, {"prefetch": prefetch})}
