"""TVM's cache object as `amx_tvm.runtime.kv` uses it: it decides which page a token gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amx_tvm.runtime.vm import VirtualMachine


class ObjectPages:
    """The pages of TVM's object.

    Parameters
    ----------
    machine : VirtualMachine
        Whose runtime it is.
    made : sequence
        What ``create_kv_cache`` returned: the object, and what every function takes behind it.
    page_size : int
        Tokens of a page.
    """

    def __init__(self, machine: VirtualMachine, made: Sequence[Any], page_size: int):
        self.arguments = tuple(made)
        self._object, self._shape, self._page_size = self.arguments[0], machine.shape, page_size
        self._call = {
            name: machine.builtin(f"vm.builtin.kv_state_{name}")
            for name in (
                "add_sequence",
                "remove_sequence",
                "fork_sequence",
                "popn",
                "begin_forward",
                "end_forward",
            )
        }
        self._available = machine.builtin("vm.builtin.attention_kv_cache_get_num_available_pages")
        self._shapes: tuple[Any, list[Any]] = (None, [])  # of the last forward pass

    def available(self) -> int:
        """Return how many pages are free."""
        return int(self._available(self._object))

    def needed(self, _sequence: int, length: int, count: int) -> int:
        """Return how many pages a sequence of a length needs for so many more tokens."""
        page = self._page_size
        return (length + count + page - 1) // page - (length + page - 1) // page

    def add(self, sequence: int) -> None:
        """Start an empty sequence."""
        self._call["add_sequence"](self._object, sequence)

    def remove(self, sequence: int) -> None:
        """Forget a sequence."""
        self._call["remove_sequence"](self._object, sequence)

    def fork(self, parent: int, child: int, position: int, length: int) -> None:
        """Start a sequence that shares the first tokens of one of a length."""
        fork_at = -1 if position == length else position  # -1: TVM's "at the end"
        self._call["fork_sequence"](self._object, parent, child, fork_at)

    def pop(self, sequence: int, count: int) -> None:
        """Forget the last tokens of a sequence."""
        self._call["popn"](self._object, sequence, count)

    def begin(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Reserve positions for one pass."""
        self._call["begin_forward"](self._object, *self._pair(sequences, counts))

    def end(self) -> None:
        """End the pass."""
        self._call["end_forward"](self._object)

    def _pair(self, sequences: Sequence[int], counts: Sequence[int]) -> list[Any]:
        """Return both as TVM takes them; steps of the same sequences follow each other."""
        key = (tuple(sequences), tuple(counts))
        if self._shapes[0] != key:
            self._shapes = (key, [self._shape(values) for values in key])
        return self._shapes[1]
