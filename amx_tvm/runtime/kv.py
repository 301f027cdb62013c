"""The paged KV cache: sequences, forks and rollbacks.

A cache holds ``max_tokens`` tokens in pages of ``page_size``, shared by at most ``max_sequences``
sequences. A fork shares its parent's pages (the last, partly filled one is copied), so a common
prompt is computed and stored once. Which page a token gets is decided by TVM's cache object
(`kv_object`) or, where keys and values are stored in few bits, here (`kv_packed`). Both work in
transactions: positions for the tokens of one model call are reserved, the call fills them, and an
end closes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from amx_tvm.artifact.memory import made_in_huge_pages
from amx_tvm.errors import GenerationError
from amx_tvm.runtime.kv_device import DevicePages
from amx_tvm.runtime.kv_object import ObjectPages
from amx_tvm.runtime.kv_packed import PackedPages
from amx_tvm.runtime.vm import VirtualMachine


class KVCache:
    """A paged KV cache with room for ``max_tokens`` tokens of ``max_sequences`` sequences.

    With ``huge`` a CPU's memory asks for huge pages: see `amx_tvm.artifact.memory`.

    Raises
    ------
    GenerationError
        There is no memory for it.

    Attributes
    ----------
    pages : int
        How many pages there are.
    adapters : dict of int to int
        The LoRA adapter of each sequence that has one.
    """

    def __init__(
        self,
        machine: VirtualMachine,
        max_sequences: int,
        max_tokens: int,
        prefill_chunk: int,
        page_size: int,
        packed: dict[str, Any] | None = None,
        huge: bool = False,
    ):
        huge = huge and machine.is_cpu
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.page_size = page_size
        sizes = (max_sequences, max_tokens, prefill_chunk)
        create = machine.function("create_kv_cache")
        try:
            shapes = [machine.shape([size]) for size in sizes]
            # In small pages a row of keys far away is a miss of the TLB, a new one a fault.
            made = made_in_huge_pages(create, *shapes) if huge else create(*shapes)
        except (RuntimeError, MemoryError) as error:
            raise GenerationError(
                f"no KV cache of {max_tokens} tokens for {max_sequences} sequences can be made "
                f"({' '.join(str(error).split())[:200]}); load with smaller kv_tokens, "
                "context_length or max_sequences"
            ) from None
        self._pages: ObjectPages | PackedPages
        if packed is None:
            self._pages = ObjectPages(machine, made, page_size)
        else:
            kind = PackedPages if machine.is_cpu else DevicePages
            self._pages = kind(machine, made, page_size, packed)
        self.pages = self.available_pages()
        self.adapters: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._ahead: dict[int, None] = {}  # sequences of a step that may turn out not to be wanted
        self._finish: Callable[[], Any] | None = None
        self._free = list(range(max_sequences - 1, -1, -1))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What every function of the model takes of the cache.

        TVM's object, and on GPUs the memory in which it notes for the kernels where a pass's pages
        are; or a tuple of tensors, another one for each pass.
        """
        return self._pages.arguments

    @property
    def sequences(self) -> int:
        """Number of sequences that exist."""
        return len(self._lengths)

    def length(self, sequence: int) -> int:
        """Return how many tokens a sequence holds."""
        return self._lengths[sequence]

    def available_pages(self) -> int:
        """Return how many pages are free, whatever is under way."""
        return self._pages.available()

    def available_tokens(self) -> int:
        """Return how many tokens the free pages hold, those of a step ahead counted in."""
        opened = sum(self._lengths[s] % self.page_size == 0 for s in self._ahead)
        return (self._pages.available() + opened) * self.page_size

    @contextmanager
    def ahead(self, sequences: Sequence[int], finish: Callable[[], Any]) -> Iterator[tuple]:
        """Reserve a position of each sequence for a step that may turn out not to be wanted.

        `adopt` makes them positions of the sequences. Another step takes them back, after
        ``finish`` has waited for the device.
        """
        counts = [1] * len(sequences)
        self.check_room(sequences, counts)
        self._pages.begin(sequences, counts)
        self._ahead, self._finish = dict.fromkeys(sequences), finish
        yield self.arguments
        self._pages.end()

    def is_ahead(self, sequence: int) -> bool:
        """Whether a step ahead has a position of a sequence."""
        return sequence in self._ahead

    def adopt(self, sequences: Sequence[int]) -> bool:
        """Keep the step ahead of these sequences; False where one of them has none.

        What the step did for other sequences is taken back.
        """
        if not self._ahead or not set(sequences) <= set(self._ahead):
            return False
        others, self._ahead = set(self._ahead).difference(sequences), {}
        for sequence in others:
            self._pages.pop(sequence, 1)
        for sequence in sequences:
            self._lengths[sequence] += 1
        return True

    def settle(self) -> None:
        """Take back the step ahead, if there is one."""
        if self._ahead and self._finish is not None:
            ahead, self._ahead = self._ahead, {}
            self._finish()
            for sequence in ahead:
                self._pages.pop(sequence, 1)

    def _settle(self, sequence: int) -> None:
        """Take back the step ahead if it is one of a sequence."""
        if sequence in self._ahead:
            self.settle()

    def add(self, adapter: int = -1) -> int:
        """Start an empty sequence, of an adapter or none (-1), and return its id."""
        sequence = self._take()
        self._pages.add(sequence)
        self._lengths[sequence] = 0
        if adapter >= 0:
            self.adapters[sequence] = adapter
        return sequence

    def fork(self, parent: int, position: int | None = None) -> int:
        """Start a sequence that shares a parent's first ``position`` tokens (default: all)."""
        self._settle(parent)
        length = self._lengths[parent]
        position = length if position is None else position
        if not 0 <= position <= length:
            raise GenerationError(f"fork at token {position}, the sequence holds {length}")
        self._check_pages(int(position % self.page_size > 0))  # the copy of a partly shared page
        child = self._take()
        self._pages.fork(parent, child, position, length)
        self._lengths[child] = position
        if parent in self.adapters:
            self.adapters[child] = self.adapters[parent]
        return child

    def rollback(self, sequence: int, count: int) -> None:
        """Forget the last ``count`` tokens of a sequence."""
        self._settle(sequence)
        length = self._lengths[sequence]
        if not 0 <= count <= length:
            raise GenerationError(f"rollback by {count} tokens, the sequence holds {length}")
        if count:
            self._pages.pop(sequence, count)
        self._lengths[sequence] = length - count

    def remove(self, sequence: int) -> None:
        """Forget a sequence and free its pages.

        Of a step ahead of several it may be one: their kernels have noted what they need.
        """
        if len(self._ahead) > 1 and sequence in self._ahead:
            del self._ahead[sequence]
        self._settle(sequence)
        self._pages.remove(sequence)
        del self._lengths[sequence]
        self.adapters.pop(sequence, None)
        self._free.append(sequence)

    def check_room(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Raise GenerationError unless the free pages hold ``counts[i]`` more tokens each."""
        needed = 0
        for s, n in zip(sequences, counts, strict=True):
            needed += self._pages.needed(s, self._lengths[s], n)
        if needed:
            self._check_pages(needed)

    def _check_pages(self, needed: int) -> None:
        free = self._pages.available()
        if needed > free:
            raise GenerationError(
                f"the KV cache is full: {needed * self.page_size} more tokens asked for, "
                f"{free * self.page_size} of {self.max_tokens} are free; end a sequence or load "
                "with a larger kv_tokens"
            )

    @contextmanager
    def forward(self, sequences: Sequence[int], counts: Sequence[int]) -> Iterator[tuple]:
        """Reserve ``counts[i]`` new positions in ``sequences[i]`` for one model call.

        Yields the `arguments` for the call.
        """
        self.settle()
        self.check_room(sequences, counts)
        self._pages.begin(sequences, counts)
        try:
            yield self.arguments
        except BaseException:
            # Close the transaction and forget its positions: the sequences are as before.
            self._pages.end()
            for sequence, count in zip(sequences, counts, strict=True):
                self._lengths[sequence] += count
                self.rollback(sequence, count)
            raise
        self._pages.end()
        for sequence, count in zip(sequences, counts, strict=True):
            self._lengths[sequence] += count

    @property
    def pauses(self) -> bool:
        """Whether other passes may run within one: see `paused`."""
        return isinstance(self._pages, ObjectPages)

    @contextmanager
    def paused(self, sequences: Sequence[int], counts: Sequence[int]) -> Iterator[None]:
        """Let other passes run within the one under way, which is of these sequences.

        TVM's object knows one pass at a time: its positions are taken back and reserved again.
        They come in the pages that they had, where earlier layers' keys are: what became free last
        is taken first.
        """
        try:
            yield
        finally:
            for sequence, count in zip(reversed(sequences), reversed(counts), strict=True):
                self._pages.pop(sequence, count)
            self._pages.begin(sequences, counts)

    def slots(self, sequences: Sequence[int], counts: Sequence[int]) -> list[int] | None:
        """Return the adapter of each row of a step, -1 for none; None where no row has one."""
        own = [self.adapters.get(sequence, -1) for sequence in sequences]
        if max(own) < 0:
            return None
        return [slot for slot, count in zip(own, counts, strict=True) for _ in range(count)]

    def _take(self) -> int:
        if not self._free:
            raise GenerationError(
                f"all {self.max_sequences} sequences of the KV cache are in use; end one, or load "
                "with a larger max_sequences"
            )
        return self._free.pop()
