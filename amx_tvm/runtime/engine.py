"""The engine: a language model, loaded and ready to generate text.

    engine = amx_tvm.load("dist/smollm2")
    engine.generate("The capital of France is", max_new_tokens=16).text

Nothing here imports TVM's Python package, its compiler library, torch, relax_passes or tuning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from amx_tvm.artifact import Manifest
from amx_tvm.errors import ArtifactError, GenerationError
from amx_tvm.runtime import session
from amx_tvm.runtime.generation import Limits, Run, TextStream, run_batch
from amx_tvm.runtime.kv import KVCache
from amx_tvm.runtime.model import Model
from amx_tvm.runtime.result import GenerationResult
from amx_tvm.runtime.sampler import Sampling
from amx_tvm.runtime.stream import special_stops
from amx_tvm.runtime.vm import Memory, VirtualMachine

DEFAULT_CONTEXT = 4096

Prompt = str | Sequence[int]


class Engine:
    """A loaded language model. Made by `load`; use it from one thread at a time.

    Attributes
    ----------
    manifest : Manifest
        What the artifact says about itself.
    context_length : int
        Longest sequence in tokens.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        machine: VirtualMachine,
        context_length: int | None,
        max_sequences: int,
        kv_tokens: int | None,
        memory: Memory,
        chunk: int,
        may_grow: bool = True,
    ):
        longest = int(manifest.model["context_length"])
        context = min(longest, DEFAULT_CONTEXT) if context_length is None else context_length
        if not 1 <= context <= longest:
            raise GenerationError(
                f"context_length is {context}, expected 1 to {longest}, the model's own"
            )
        if max_sequences < 1:
            raise GenerationError(f"max_sequences is {max_sequences}, expected at least 1")
        self._kv_tokens = context if kv_tokens is None else kv_tokens
        if self._kv_tokens < 1:
            raise GenerationError(f"kv_tokens is {kv_tokens}, expected at least 1")
        self.path = path
        self.manifest = manifest
        self.context_length = context
        self.max_sequences = max_sequences
        self._machine = machine
        self._chunk = chunk
        self._may_grow = may_grow  # whether a batch may make the KV cache larger
        self._model = Model(
            machine,
            machine.load_parameters(path, manifest, memory),
            int(manifest.model["vocab_size"]),
            context,
            self._chunk,
            manifest.functions,
        )
        self._cache: KVCache | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, a `tokenizers.Tokenizer`; read at the first use."""
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise ArtifactError(
                f"{self.path} has no tokenizer.json, so it takes and returns token ids only"
            )
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ArtifactError(
                "text needs the package `tokenizers`, which is not installed here (`pip install "
                "tokenizers`); give and take token ids instead, or use the C++ runner"
            ) from None
        return Tokenizer.from_file(str(file))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, with the BOS token if the model wants one.

        Special tokens that are spelled out in the text, as chat templates do, are recognised, and
        a BOS that is spelled out is not put there twice. A text that is to be continued gets no
        EOS, even if the tokenizer's post-processor adds one (``tokenizer.encode`` does).
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        prefix = self.manifest.prompt_prefix
        return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return self.tokenizer.decode(list(token_ids))

    def generate(
        self, prompt: Prompt, max_new_tokens: int = 128, **options: Any
    ) -> GenerationResult:
        """Continue a prompt.

        Parameters
        ----------
        prompt : str or sequence of int
            A text, or token ids (then nothing is added to them).
        max_new_tokens : int
            Most tokens to add; generation also ends at EOS and at the end of the context.
        temperature, top_k, top_p, min_p, repetition_penalty, seed
            See `amx_tvm.runtime.Sampling`. The default, temperature 0, is greedy.
        stop : str or sequence of str
            Texts that end the generation; they are not part of the result. One that is a special
            token ends it when the model chooses the token.
        stop_token_ids : sequence of int
            More tokens that end it.
        ignore_eos : bool
            Go on after EOS (for measurements).
        sequence : session.Sequence, optional
            Work on this sequence and keep it: what it shares with the prompt is not computed
            again. A chat passes the same one every turn.

        Raises
        ------
        GenerationError
            An empty prompt, one longer than the context, or an option out of range.
        """
        with self.stream(prompt, max_new_tokens, **options) as pieces:
            for _ in pieces:
                pass
            return pieces.result

    def stream(self, prompt: Prompt, max_new_tokens: int = 128, **options: Any) -> TextStream:
        """Continue a prompt piece by piece; options as in `generate`.

        Returns
        -------
        TextStream
            An iterator of str, about one piece a token, never half a character nor part of a stop
            string. Its ``result`` holds everything once it has ended.
        """
        sequence = options.pop("sequence", None)
        run = self._run(prompt, max_new_tokens, dict(options))
        owned = sequence is None
        return TextStream(run, self.sequence() if owned else sequence, owned)

    def generate_batch(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 128, **options: Any
    ) -> list[GenerationResult]:
        """Continue several prompts together; options as in `generate`, the same for all.

        Every decode step serves all sequences under way; a prompt starts as soon as another has
        ended where there are more than ``max_sequences``. With a seed, each prompt draws from its
        own stream, the first one's being that of `generate`.
        """
        if "sequence" in options:
            raise GenerationError("generate_batch makes its own sequences; leave out `sequence`")
        runs = [
            self._run(prompt, max_new_tokens, dict(options), stream)
            for stream, prompt in enumerate(prompts)
        ]
        needs = {id(run): self._pages(run, max_new_tokens) for run in runs}
        together = sum(sorted(needs.values(), reverse=True)[: self.max_sequences])
        wanted = together * self._page_size if self._may_grow else 0
        cache = self._reserve(max(wanted, self._kv_tokens))
        slots = self.max_sequences - cache.sequences
        if runs and slots < 1:
            raise GenerationError(
                f"all {self.max_sequences} sequences are in use; close one before generate_batch"
            )

        def room(run: Run, active: list[tuple[Run, session.Sequence]]) -> bool:
            owed = sum(needs[id(other)] - len(s) // self._page_size for other, s in active)
            return needs[id(run)] + owed <= cache.available_tokens() // self._page_size

        return run_batch(runs, self.sequence, slots, room)

    def logits(self, token_ids: Iterable[int]) -> np.ndarray:
        """Return float32 logits [len(token_ids), vocab]: row i follows tokens 0..i."""
        with self.sequence() as sequence:
            return sequence.score(token_ids)

    def sequence(self) -> session.Sequence:
        """Start an empty sequence: append tokens, fork it, roll it back; close it at the end."""
        cache = self._reserve(self._kv_tokens)
        return session.Sequence(self._model, cache, cache.add(), [])

    @property
    def _has_text(self) -> bool:
        """Whether tokens can be turned into text: a tokenizer and the package that reads it."""
        return (self.path / "tokenizer.json").is_file() and find_spec("tokenizers") is not None

    @property
    def _page_size(self) -> int:
        return int(self.manifest.kv_cache["page_size"])

    def _pages(self, run: Run, max_new_tokens: int) -> int:
        """Pages that a run fills at most; one more, since a fork copies a page it shares partly."""
        tokens = min(self.context_length, len(run.prompt) + max_new_tokens)
        return -(-tokens // self._page_size) + 1

    def _reserve(self, tokens: int) -> KVCache:
        """Return a cache for at least ``tokens``; grows only while no sequence lives in it.

        The pages are virtual memory until they are written, so a long context that is not used
        costs nothing on the CPU.
        """
        if self._cache is None or (self._cache.max_tokens < tokens and not self._cache.sequences):
            self._cache = None  # freed before the next is allocated
            self._cache = KVCache(
                self._machine, self.max_sequences, tokens, self._chunk, self._page_size
            )
        return self._cache

    def _run(
        self, prompt: Prompt, max_new_tokens: int, options: dict[str, Any], stream: int = 0
    ) -> Run:
        """Check a request and turn it into a Run."""
        stop = options.pop("stop", ())
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if stop and not self._has_text:
            raise GenerationError(
                f"stop strings need the package `tokenizers` and a tokenizer in {self.path}"
            )
        stop_tokens = set(options.pop("stop_token_ids", ()))
        if not options.pop("ignore_eos", False):
            stop_tokens.update(self.manifest.model["eos_token_ids"])
        if stop:
            stop_tokens |= special_stops(self.tokenizer, stop)
        limits = Limits(max_new_tokens, stop, frozenset(stop_tokens))
        try:
            sampling = Sampling(**options)
        except TypeError as error:
            raise GenerationError(f"unknown generation option ({error})") from None
        tokens = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        tokens = self._model.check_tokens(tokens).tolist()
        if not tokens:
            raise GenerationError("the prompt is empty, expected at least one token")
        if len(tokens) > self.context_length:
            raise GenerationError(
                f"the prompt has {len(tokens)} tokens, the context is {self.context_length}; "
                f"shorten it, or load with context_length up to "
                f"{self.manifest.model['context_length']}"
            )
        tokenizer = self.tokenizer if self._has_text else None
        return Run(tokens, sampling, limits, tokenizer, self.context_length, stream)
