"""Mixtures of experts on CPUs: the choice of experts, and the order that groups rows by expert.

A router's scores [rows, experts] become, for each row, the k best experts and their shares. The
products then run over rows sorted by expert (``LinearSpec.experts``): an expert's weights are read
once for all its rows, and not at all without any. Slot s of that order holds row ``source[s]``;
``place[t, j]`` is the slot of row t's j-th expert.
"""

from __future__ import annotations

from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.math import exp

LOWEST = -3.4e38


def route(experts: int, chosen: int, over_all: bool, rows: int | None) -> Any:
    """Build the kernel: scores float32 [M, experts] -> ids int32 and shares float32 [M, chosen].

    Parameters
    ----------
    experts, chosen : int
        How many there are, and how many a row takes, best first.
    over_all : bool
        Shares are the softmax over all experts' scores; otherwise over those of the chosen.
    rows : int or None
        M; None compiles a function for every M.
    """
    buffers = (
        ("scores", (None, experts), "float32"),
        ("ids", (None, chosen), "int32"),
        ("shares", (None, chosen), "float32"),
    )
    with e.function("expert_route", buffers, rows) as (b, m), e.parallel(0, m) as t:
        left = e.workspace((experts,), "float32")
        with e.serial(0, experts) as i:
            e.store(left, e.load(b["scores"], t, i), i)
        with e.serial(0, chosen) as j:
            best = e.Register("float32", 1, e.const(LOWEST, "float32"))
            at = e.Register("int32", 1, e.const(0))
            with e.serial(0, experts) as i:
                with e.when(e.load(left, i) > best.get()), e.then():
                    best.set(e.load(left, i))
                    at.set(i)
            e.store(b["ids"], at.get(), t, j)
            e.store(b["shares"], best.get(), t, j)
            e.store(left, e.const(LOWEST, "float32"), at.get())
        first = e.opaque(e.load(b["shares"], t, 0), "float32", 1)
        total = e.Register("float32", 1, e.const(0.0, "float32"))
        scores, count = (b["scores"], experts) if over_all else (b["shares"], chosen)
        with e.serial(0, count) as i:
            total.set(total.get() + exp(e.load(scores, t, i) - first, 1))
        with e.serial(0, chosen) as j:
            share = exp(e.load(b["shares"], t, j) - first, 1)
            e.store(b["shares"], share / total.get(), t, j)
    return b["func"].without_attr("global_symbol")


def group(experts: int, chosen: int, rows: int | None) -> Any:
    """Build the kernel: ids int32 [M, chosen] -> source, place int32 [M, chosen], bounds.

    ``source`` is one list of M * chosen slots; ``bounds`` int32 [experts + 1] are the first slot of
    each expert and the end.
    """
    buffers = (
        ("ids", (None, chosen), "int32"),
        ("source", (None, chosen), "int32"),
        ("place", (None, chosen), "int32"),
        ("bounds", (experts + 1,), "int32"),
    )
    with e.function("expert_group", buffers, rows) as (b, m):
        cursor = e.workspace((experts,), "int32")
        with e.serial(0, experts) as i:
            e.store(cursor, e.const(0), i)
        with e.serial(0, m) as t, e.serial(0, chosen) as j:
            expert = e.let(e.load(b["ids"], t, j))
            e.store(cursor, e.load(cursor, expert) + 1, expert)
        e.store(b["bounds"], e.const(0), 0)
        with e.serial(0, experts) as i:
            start = e.opaque(e.load(b["bounds"], i), "int32", 1)
            e.store(b["bounds"], start + e.load(cursor, i), i + 1)
            e.store(cursor, start, i)
        with e.serial(0, m) as t, e.serial(0, chosen) as j:
            expert = e.let(e.load(b["ids"], t, j))
            slot = e.opaque(e.load(cursor, expert), "int32", 1)
            e.store(cursor, slot + 1, expert)
            row = e.let(e.tirx.truncdiv(slot, e.const(chosen)))
            e.store(b["source"], t, row, slot - row * chosen)
            e.store(b["place"], slot, t, j)
    return b["func"].without_attr("global_symbol")
