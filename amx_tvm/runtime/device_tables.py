"""Tables that choices on a GPU refer to: counts of tokens, masks, biases (choices.py has them).

They grow with what a step needs and start empty, since most requests need none. A table of counts
belongs to a request and is counted on by the device itself; where a step that was started ahead has
been thrown away, or tokens were chosen elsewhere, it is written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from amx_tvm.runtime.choices import RowChoice, bias_entries
from amx_tvm.runtime.vm import VirtualMachine


class DeviceTables:
    """The tables of one engine.

    Parameters
    ----------
    machine : VirtualMachine
        Whose device they are on.
    vocab : int
        Number of tokens.
    """

    def __init__(self, machine: VirtualMachine, vocab: int):
        self._machine, self._vocab = machine, vocab
        self._counts = self._made(1, vocab)
        self._masks = self._made(1, -(-vocab // 32))
        self._biases = self._made(1, 2)
        self._holders: WeakValueDictionary[int, RowChoice] = WeakValueDictionary()
        self._biased: list[RowChoice] = []

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        """Counts, masks and biases, as the compiled functions take them."""
        return self._counts, self._masks, self._biases

    def place(self, choices: Sequence[RowChoice]) -> None:
        """Have the tables say what they shall for a step of these rows; none may be under way."""
        penalized = [choice for choice in choices if choice.sampling.penalizes]
        if penalized:
            self._place_counts(penalized)
        biased = [choice for choice in choices if choice.sampling.logit_bias]
        if biased and not _same(biased, self._biased):
            entries = [bias_entries(choice.sampling.logit_bias) for choice in biased]
            first = 0
            for choice, part in zip(biased, entries, strict=True):
                choice.place("bias_first", first)
                first += len(part)
            self._biases = self._grown(self._biases, first)
            self._machine.write(self._biases, 0, np.concatenate(entries))
            self._biased = biased

    def allow(self, masks: Sequence[np.ndarray | None]) -> list[int | None]:
        """Upload masks, int32 [vocab/32] each; returns where each row's is."""
        given = [mask for mask in masks if mask is not None]
        if given:
            self._masks = self._grown(self._masks, len(given))
            self._machine.write(self._masks, 0, np.stack(given))
        slots = iter(range(len(given)))
        return [None if mask is None else next(slots) for mask in masks]

    def _place_counts(self, choices: list[RowChoice]) -> None:
        """Give each its table, with what it has seen."""
        held = {id(choice): slot for slot, choice in self._holders.items()}
        new = [choice for choice in choices if id(choice) not in held]
        if new:
            slots = self._counts.shape[0]
            if len(held) + len(new) > slots:
                self._counts = self._grown(self._counts, len(held) + len(new))
                for choice in self._holders.values():
                    choice.noted = -1
            free = (s for s in range(self._counts.shape[0]) if s not in self._holders)
            for choice, slot in zip(new, list(free), strict=False):
                self._holders[slot], choice.noted = choice, -1
                held[id(choice)] = slot
        for choice in choices:
            slot = held[id(choice)]
            if choice.noted != len(choice.made):
                row = np.bincount(choice.made, minlength=self._vocab).astype(np.int32)
                row[choice.prompt] |= np.int32(-(2**31))
                self._machine.write(self._counts, slot, row[None])
                choice.noted = len(choice.made)
            choice.place("counts", slot)

    def _made(self, *shape: int) -> Any:
        return self._machine.to_device(np.zeros(shape, np.int32))

    def _grown(self, table: Any, rows: int) -> Any:
        """Return the table, or a larger one with nothing in it."""
        if rows <= table.shape[0]:
            return table
        return self._made(1 << (rows - 1).bit_length(), *table.shape[1:])


def _same(left: list[RowChoice], right: list[RowChoice]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
