"""The compiled functions of a language model, and the one step that everything is written with.

`Model.forward` runs any mix of sequences: a token of each, chunks of prompts, rows to be scored.
It alone knows which functions an artifact has and which of them serves a step best.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from amx_tvm.artifact import Manifest
from amx_tvm.errors import GenerationError
from amx_tvm.images import ImageSettings
from amx_tvm.runtime.budget import POOLED_CHUNKS
from amx_tvm.runtime.choices import ROWS
from amx_tvm.runtime.device_steps import DeviceSteps, padded
from amx_tvm.runtime.inputs import Vector
from amx_tvm.runtime.kv import KVCache
from amx_tvm.runtime.pauses import Pausing
from amx_tvm.runtime.pictures import Pictures
from amx_tvm.runtime.vm import VirtualMachine
from amx_tvm.schema import conform

FEW = 15  # rows that an artifact's function ``forward_some`` takes at most


class Model:
    """The compiled functions of a language model, bound to their parameters.

    Parameters
    ----------
    machine : VirtualMachine
        The loaded executable.
    parameters : object
        The parameter tuple on the device.
    vocab_size : int
        Token ids must be below it: the compiled embedding lookup does not check.
    context_length : int
        Longest sequence in tokens.
    chunk : int
        Most rows in one call of `forward` that is not a token of each sequence.
    functions : sequence of str
        Names of the artifact's functions, where it lists them.
    long_after : int
        Length after which a sequence turns by other rotary frequencies, from its first token on;
        its tokens are then given as -1 - id. 0 for models without such a length.
    """

    def __init__(
        self,
        machine: VirtualMachine,
        parameters: Any,
        vocab_size: int,
        context_length: int,
        chunk: int,
        functions: Iterable[str] = (),
        long_after: int = 0,
    ):
        self.long_after = long_after
        self.pictures: Pictures | None = None  # where prompts may have images
        self._names = frozenset(functions)
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.chunk = chunk
        self._machine = machine
        self._parameters = parameters
        self._functions: dict[str, Any] = {}
        self._ids, self._picks, self._slots = Vector(machine), Vector(machine), Vector(machine)
        self._pooled: set[int] = set()  # rows of steps whose buffers TVM keeps

    def see(self, manifest: Manifest) -> ImageSettings | None:
        """Let prompts have images where the model takes any, and return how they become rows."""
        if "images" not in manifest.model:
            return None
        settings = conform(ImageSettings, manifest.model["images"])
        hidden = int(manifest.model["config"]["hidden_size"])
        self.pictures = Pictures(self._machine, self._parameters, settings, self.vocab_size, hidden)
        return settings

    def forward(
        self,
        cache: KVCache,
        sequences: Sequence[int],
        lengths: Sequence[int],
        tokens: Sequence[int] | np.ndarray,
        wanted: Sequence[int],
        look: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """Add tokens to sequences in one step, and return the logits that are wanted.

        Parameters
        ----------
        cache : KVCache
            Where the sequences live.
        sequences : sequence of int
            Their ids in the cache, each once.
        lengths : sequence of int
            How many of the tokens each gets, at least 1; `chunk` at most together, unless each
            gets one.
        tokens : sequence of int or ndarray
            The token ids, checked, those of a sequence in a row.
        wanted : sequence of int
            For each sequence, of how many of its last rows the logits are wanted.
        look : callable, optional
            Called between kernels, where the model `pauses` and the step is more than `FEW` rows of
            plain prompts; other steps may run in it, within ``cache.paused``.

        Returns
        -------
        ndarray
            float32 [sum(wanted), vocab].

        Raises
        ------
        GenerationError
            The cache has not enough free pages. Whatever is raised, the sequences are as before.

        Notes
        -----
        Python that runs once a step finds the caches full of weights: every line of it counts.
        """
        count, asked = len(tokens), sum(wanted)
        each = count == len(sequences)
        picks: list[int] | None = None
        given: tuple[Any, ...] = ()
        slots = cache.slots(sequences, lengths) if cache.adapters else None
        if slots is not None:
            name = key = "forward_adapted"
            given = (self._slots.put(slots),)
            picks = self._picked(lengths, wanted)
        elif self.pictures is not None and max(tokens) >= self.vocab_size:
            tokens, table = self.pictures.gather(tokens)
            given = (table,)
            name = key = "forward_given"
            picks = self._picked(lengths, wanted)
        elif each and count == 1:
            name = key = "forward_one"
        elif count <= FEW and "forward_some" in self._names:
            name = key = "forward_some"
            picks = self._picked(lengths, wanted)
        elif each and "begin_each" in self._names and count <= ROWS:
            size = padded(count)  # one of those that have a graph
            name, key = "forward_each", f"forward_each {size}"
            tokens = [*tokens, *[0] * (size - count)]
        elif each and "forward_each" in self._names and "begin_each" not in self._names:
            name = key = "forward_each"
        else:
            name = key = "forward"
            picks = self._picked(lengths, wanted)
        if picks is not None and name != "forward_some" and count not in self._pooled:
            self._pool(count)
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = self._machine.function(name)
        rows = count if picks is None else len(picks)
        ids, picked = self._ids, self._picks
        if look is not None and name == "forward":
            function, ids, picked = partial(self._pausing, look), *self._held
        given = (ids.put(tokens), *given)
        if picks is not None:
            given += (picked.put(picks),)
        with cache.forward(sequences, lengths) as arguments:
            logits = function(*given, *arguments, self._parameters)
            found = self._machine.to_host(logits, rows)
        return found if rows == asked else found[np.flatnonzero(wanted)]

    def _picked(self, lengths: Sequence[int], wanted: Sequence[int]) -> list[int]:
        """Return of which rows a step computes logits.

        Within a prompt of none: reading the head's weights is a tenth of a small chunk's time. A
        GPU's functions take one row at least.
        """
        rows = last_rows(lengths, wanted)
        return rows if rows or self._machine.is_cpu else [sum(lengths) - 1]

    def _pool(self, rows: int) -> None:
        """Bound what TVM's allocator keeps: it has a pool of its own for each size of a buffer.

        Prompts have chunks of any number of rows. On GPUs the allocator empties its pools itself
        when memory runs out; a CPU's system ends the process then.
        """
        if sum(self._pooled) + rows > POOLED_CHUNKS * self.chunk and self._machine.is_cpu:
            self._machine.release()
            self._pooled.clear()
        self._pooled.add(rows)

    @cached_property
    def steps(self) -> DeviceSteps:
        """Steps whose tokens the device chooses."""
        return DeviceSteps(self._machine, self._parameters, self.vocab_size)

    @property
    def pauses(self) -> bool:
        """Whether steps of others may run between the kernels of a chunk."""
        return self._machine.is_cpu and self.pictures is None and not self.long_after

    @cached_property
    def _pausing(self) -> Pausing:
        return Pausing(self._machine, "forward")

    @cached_property
    def _held(self) -> tuple[Vector, Vector]:
        """Ids and picks of a call within which others run."""
        return Vector(self._machine), Vector(self._machine)

    @property
    def mixes(self) -> bool:
        """Whether one call for next tokens and prompts is faster than two.

        On GPUs it reads the weights once; but it brings all logits to the host, so not where the
        device chooses tokens itself. CPUs have kernels for few rows that a mixed call cannot use.
        """
        return not self._machine.is_cpu and self.chooses <= 1

    @cached_property
    def chooses(self) -> int:
        """Of how many sequences the device can choose the tokens itself, in a step."""
        return ROWS if "begin_each" in self._names else int("begin_one" in self._names)

    @cached_property
    def clusters(self) -> bool:
        """Whether the device's kernels were made for blocks that form clusters (sm_90 and on)."""
        numbers = [re.match(r"sm_(\d+)", feature) for feature in self._machine.features]
        found = [int(number[1]) for number in numbers if number]
        return bool(found) and min(found) >= 90

    def check_tokens(self, tokens: Iterable[int], name: str = "") -> np.ndarray:
        """Return token ids as int32 [n]; GenerationError names the first that is out of range.

        ``name`` is the option that holds them, if one does.
        """
        array = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise GenerationError(
                f"token ids have shape {array.shape} and type {array.dtype}, expected a flat list "
                "of integers"
            )
        wrong = np.flatnonzero((array < 0) | (array >= self.vocab_size))
        if wrong.size:
            raise GenerationError(
                f"token id {array[wrong[0]]} at position {wrong[0]}{name and f' of {name}'} is "
                f"outside the vocabulary of {self.vocab_size}"
            )
        return array.astype(np.int32)

    def check_step(self, tokens: Iterable[int]) -> list[int]:
        """Return token ids as a list; the check of `check_tokens`, quick where they are ints."""
        tokens = list(tokens)
        limit = self.vocab_size
        for token in tokens:
            if type(token) is not int or not 0 <= token < limit:
                return self.check_tokens(tokens).tolist()
        return tokens


def last_rows(lengths: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Return the indices of the last rows of each sequence that are wanted.

    Parameters
    ----------
    lengths : sequence of int
        Rows of each sequence; those of one lie behind another's.
    wanted : sequence of int
        How many of each.
    """
    rows: list[int] = []
    end = 0
    for length, count in zip(lengths, wanted, strict=True):
        end += length
        rows.extend(range(end - count, end))
    return rows
