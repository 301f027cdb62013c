"""The engine: a language model, loaded and ready to generate text.

    engine = amx_tvm.load("dist/smollm2")
    engine.generate("The capital of France is", max_new_tokens=16).text

Nothing here imports TVM's Python package, its compiler library, torch, relax_passes or tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from amx_tvm.artifact import Manifest
from amx_tvm.errors import GenerationError
from amx_tvm.images import PromptImage
from amx_tvm.runtime import session
from amx_tvm.runtime.generation import TextStream, complete
from amx_tvm.runtime.kv import KVCache
from amx_tvm.runtime.model import Model
from amx_tvm.runtime.options import (
    DEFAULT_NEW_TOKENS,
    GenerateOptions,
    OptionsBesides,
    RequestOptions,
    flag,
    number,
    read_options,
)
from amx_tvm.runtime.own_thread import OwnThread
from amx_tvm.runtime.pictures import prepared
from amx_tvm.runtime.prefixes import Prefixes
from amx_tvm.runtime.request import Handle, Request
from amx_tvm.runtime.result import GenerationResult
from amx_tvm.runtime.scheduler import Scheduler
from amx_tvm.runtime.speculation import Speculation
from amx_tvm.runtime.stream import special_stops
from amx_tvm.runtime.tokenizer import encode, load_tokenizer
from amx_tvm.runtime.verification import DraftingScheduler
from amx_tvm.runtime.vm import Memory, VirtualMachine
from amx_tvm.runtime.worker import Worker

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_CONTEXT = 4096
_MOST_TOKENS = (1 << 31) - 1  # what TVM's cache counts with

Prompt = str | Sequence[int]
_R = TypeVar("_R")


class Engine(OwnThread):
    """A loaded language model. Made by `load`; any thread may use it.

    Compiled code runs on one thread that the engine owns (`amx_tvm.runtime.worker`): calls of
    several threads take turns, and generations step in turn. An engine that is dropped frees
    everything.

    Attributes
    ----------
    manifest : Manifest
        What the artifact says about itself.
    context_length : int
        Longest sequence in tokens.
    max_sequences : int
        Most sequences at once.
    images : ImageSettings or None
        How images become rows of a prompt, where the model takes any.
    adapters : tuple of str
        Names of the LoRA adapters that requests may choose.
    speculation : Speculation or None
        What drafts of repeated text are made with, where `load` was asked for it.
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
        threads: int | None = None,
        speculation: bool = False,
    ):
        longest = int(manifest.model["context_length"])
        context = min(longest, DEFAULT_CONTEXT)
        if context_length is not None:
            context = number(1, longest, whole=True, note=", the model's own")(
                "context_length", context_length
            )
        count = number(1, _MOST_TOKENS, whole=True)
        self._kv_tokens = context if kv_tokens is None else count("kv_tokens", kv_tokens)
        self.path = path
        self.manifest = manifest
        self.context_length = context
        self.max_sequences = count("max_sequences", max_sequences)
        self._machine = machine
        self._chunk = chunk
        self._huge = memory != "map"
        self._may_grow = may_grow  # whether a batch may make the KV cache larger
        super().__init__(machine, threads)
        self._model = Model(
            machine,
            machine.load_parameters(path, manifest, memory),
            int(manifest.model["vocab_size"]),
            context,
            self._chunk,
            manifest.functions,
            int(manifest.model.get("long_after", 0)),
        )
        self.images = self._model.see(manifest)
        self.adapters = tuple(manifest.model.get("adapters", ()))
        self._cache: KVCache | None = None
        self.speculation = Speculation() if flag("speculation", speculation) else None

    def __repr__(self) -> str:
        model, made = self.manifest.model, self.manifest.quantization.get("format", "none")
        return (
            f"<Engine {model.get('name', '?')}, {made} on {self.manifest.target.device}, "
            f"context {self.context_length}>"
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, a `tokenizers.Tokenizer`; read at the first use."""
        return load_tokenizer(self.path)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, with the BOS token if the model wants one.

        Special tokens that are spelled out in the text, as chat templates do, are recognised, and
        a BOS that is spelled out is not put there twice. A text that is to be continued gets no
        EOS, even if the tokenizer's post-processor adds one (``tokenizer.encode`` does).

        Raises
        ------
        GenerationError
            The text holds bytes that are no characters, or characters that the model's vocabulary
            lacks and has no token for.
        """
        return encode(self.tokenizer, text, self.manifest.prompt_prefix)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return self.tokenizer.decode(list(token_ids))

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = DEFAULT_NEW_TOKENS,
        **options: Unpack[GenerateOptions],
    ) -> GenerationResult:
        """Continue a prompt.

        Parameters
        ----------
        prompt : str or sequence of int
            A text, or token ids (then nothing is added to them).
        max_new_tokens : int
            Most tokens to add; generation also ends at EOS, at the end of the context, and where
            the KV cache is full.
        temperature, top_k, top_p, min_p, repetition_penalty, seed, ...
            See `amx_tvm.runtime.Sampling`. The default, temperature 0, is greedy.
        min_tokens, stop, stop_token_ids, ignore_eos
            See `amx_tvm.runtime.Limits`.
        images : sequence of ImageInput, optional
            Files, their content, arrays or Pillow's images: one for each place that the prompt has,
            which is the model's token for images, such as ``<image>``.
        adapter : str, optional
            Name of one of `adapters` to answer with; by default none.
        sequence : session.Sequence, optional
            Work on this sequence and keep it: what it shares with the prompt is not computed
            again. A chat passes the same one every turn.

        Raises
        ------
        GenerationError
            An empty prompt, one longer than the context or the KV cache, or an option out of
            range. None is the default of every option.
        """
        request = self.request(prompt, max_new_tokens=max_new_tokens, **options)
        return complete(self._worker, self._scheduler(1), [request], self._start)[0]

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = DEFAULT_NEW_TOKENS,
        **options: Unpack[GenerateOptions],
    ) -> TextStream:
        """Continue a prompt piece by piece; options as in `generate`.

        Returns
        -------
        TextStream
            An iterator of str, about one piece a token, never half a character nor part of a stop
            string. Its ``result`` holds everything once it has ended.
        """
        request = self.request(prompt, max_new_tokens=max_new_tokens, **options)
        return TextStream(self._worker, self._scheduler(1), request, self._start)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | None = DEFAULT_NEW_TOKENS,
        adapter: str | Sequence[str | None] | None = None,
        **options: Unpack[OptionsBesides],
    ) -> list[GenerationResult]:
        """Continue several prompts together; options as in `generate`, the same for all.

        ``adapter`` may also be a list with the name of each prompt's, or None.

        Every decode step serves all sequences under way; a prompt starts as soon as another has
        ended where there are more than ``max_sequences``. With a seed, each prompt draws from its
        own stream, the first one's being that of `generate`.
        """
        if options.get("sequence") is not None:
            raise GenerationError("generate_batch makes its own sequences; leave out `sequence`")
        if isinstance(prompts, str | bytes | dict) or not isinstance(prompts, Iterable):
            raise GenerationError(f"prompts are {prompts!r}, expected a list of texts or token ids")
        prompts = list(prompts)
        each = [adapter] * len(prompts) if isinstance(adapter, str | None) else list(adapter)
        if len(each) != len(prompts):
            raise GenerationError(
                f"adapter lists {len(each)} names for {len(prompts)} prompts, expected one for each"
            )
        requests = [
            self.request(prompt, stream, max_new_tokens=max_new_tokens, adapter=own, **options)
            for stream, (prompt, own) in enumerate(zip(prompts, each, strict=True))
        ]
        return complete(self._worker, self._scheduler(None), requests, self._start)

    def request(
        self,
        prompt: Prompt,
        stream: int = 0,
        sequence: Any = None,
        mask: Any = None,
        images: Any = None,
        adapter: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Request:
        """Return a checked request for `Scheduler.add`; options as in `generate`.

        Parameters
        ----------
        prompt : str or sequence of int
            A text, or token ids.
        stream : int
            Requests with the same seed draw from different streams.
        images, adapter
            As in `generate`.
        sequence, mask
            See `amx_tvm.runtime.request.Request`, whose callbacks `dataclasses.replace` sets.
        """
        sampling, limits = read_options(options)
        tokens, pictures = self._prompt(prompt, images)
        if sequence is not None and not isinstance(sequence, session.Sequence):
            raise GenerationError(
                f"sequence is {sequence!r}, expected one that engine.sequence() made"
            )
        slot = self.adapter_slot(adapter)
        if sequence is not None and sequence.open and sequence.adapter != slot:
            raise GenerationError(
                f"the sequence was begun with {self._adapter_name(sequence.adapter)} and the "
                f"request asks for {self._adapter_name(slot)}; give engine.sequence() the same one"
            )
        if mask is not None and not callable(mask):
            raise GenerationError(f"mask is {mask!r}, expected a callable; see Request.mask")
        self._model.check_tokens(sampling.logit_bias, "logit_bias")
        self._model.check_tokens(limits.stop_token_ids, "stop_token_ids")
        has_text = self._has_text
        if limits.stop and not has_text:
            raise GenerationError(
                f"stop strings need the package `tokenizers` and a tokenizer in {self.path}"
            )
        stops = limits.stop_token_ids
        if not limits.ignore_eos:
            stops = stops | frozenset(self.manifest.model["eos_token_ids"])
        if limits.stop:
            stops = stops | special_stops(self.tokenizer, limits.stop)
        tokenizer = self.tokenizer if has_text else None
        parts = (tokens, sampling, limits, stops, stream, tokenizer, sequence, pictures)
        return Request(*parts, mask=mask, adapter=slot)

    def scheduler(
        self,
        max_sequences: int | None = None,
        prefill_rows: int | None = None,
        keep: int = 0,
    ) -> Scheduler:
        """Return a scheduler: requests that share their steps, turned by whoever calls ``step``.

        Parameters
        ----------
        max_sequences : int, optional
            Most requests under way; by default as many as the engine has sequences.
        prefill_rows : int, optional
            Most tokens of prompts in a step beside decoding; by default as many as a step takes.
        keep : int
            Most sequences of ended requests that stay, for those that begin like them; the pages
            of the least recently used are taken where others need them.
        """
        count = number(1, whole=True)
        if max_sequences is not None:
            max_sequences = count("max_sequences", max_sequences)
        if prefill_rows is not None:
            prefill_rows = count("prefill_rows", prefill_rows)
        return self._scheduler(max_sequences, prefill_rows, Prefixes(keep))

    def logits(self, token_ids: Iterable[int], adapter: str | None = None) -> np.ndarray:
        """Return float32 logits [len(token_ids), vocab]: row i follows tokens 0..i."""

        def score() -> np.ndarray:
            with self.sequence(adapter) as sequence:
                return sequence.score(token_ids)

        return self._worker.call(score)

    def sequence(self, adapter: str | None = None) -> session.Sequence:
        """Start an empty sequence: append tokens, fork it, roll it back; close it at the end.

        All of its tokens, and its forks', have the ``adapter``.
        """
        return self._worker.call(self._sequence, self.adapter_slot(adapter))

    def adapter_slot(self, name: str | None) -> int:
        """Return the number of an adapter, -1 for None; GenerationError for one there is not."""
        if name is None:
            return -1
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none; compile the model with adapters="
            raise GenerationError(f"adapter is {name!r}, this artifact has {known}")
        return self.adapters.index(name)

    def _adapter_name(self, slot: int) -> str:
        return "no adapter" if slot < 0 else f"adapter {self.adapters[slot]!r}"

    @property
    def worker(self) -> Worker:
        """The engine's thread."""
        return self._worker

    def call(self, function: Callable[..., _R], *arguments: Any) -> _R:
        """Run a function on the engine's thread and return its result.

        A loop over a sequence's methods that runs there hands nothing over in each of its steps.
        """
        return self._worker.call(function, *arguments)

    def _sequence(self, adapter: int = -1) -> session.Sequence:
        cache = self._reserve(self._kv_tokens)
        return session.Sequence(self._model, cache, cache.add(adapter), [], self._worker)

    def _scheduler(
        self,
        most: int | None,
        prefill_rows: int | None = None,
        prefixes: Prefixes | None = None,
    ) -> Scheduler:
        most = self.max_sequences if most is None else min(most, self.max_sequences)
        cache = partial(self._reserve, self._kv_tokens)
        parts = (self._model, cache, self._worker, most, prefill_rows, prefixes)
        if self.speculation is None:
            return Scheduler(*parts)
        return DraftingScheduler(*parts, speculation=self.speculation)

    def _start(self, scheduler: Scheduler, requests: list[Request]) -> list[Handle]:
        """Add requests to a new scheduler and step it to its end (on the engine's thread)."""
        if self._may_grow and len(requests) > 1:
            pages = sorted(map(self._pages, requests), reverse=True)[: self.max_sequences]
            self._reserve(max(sum(pages) * self._page_size, self._kv_tokens))
        handles = [scheduler.add(request) for request in requests]
        self._worker.attach(scheduler)
        return handles

    @property
    def _has_text(self) -> bool:
        """Whether tokens can be turned into text: a tokenizer and the package that reads it."""
        return (self.path / "tokenizer.json").is_file() and find_spec("tokenizers") is not None

    @property
    def _page_size(self) -> int:
        return int(self.manifest.kv_cache["page_size"])

    def _pages(self, request: Request) -> int:
        """Pages that a request fills at most; one more, since a fork copies a page it shares."""
        tokens = min(self.context_length, len(request.prompt) + request.limits.max_new_tokens)
        return -(-tokens // self._page_size) + 1

    def _reserve(self, tokens: int) -> KVCache:
        """Return a cache for at least ``tokens``; grows only while nothing lives in it.

        The pages are virtual memory until they are written, so a long context that is not used
        costs nothing on the CPU.
        """
        idle = self._cache is None or not (self._cache.sequences or self._worker.jobs)
        if self._cache is None or (self._cache.max_tokens < tokens and idle):
            self._cache = None  # freed before the next is allocated
            rows = max(self._chunk, self.max_sequences)  # of a step: a chunk, or a token each
            packed = self.manifest.kv_cache.get("packed")
            self._cache = KVCache(
                self._machine, self.max_sequences, tokens, rows, self._page_size, packed, self._huge
            )
        return self._cache

    def _prompt(
        self, prompt: Prompt, images: Any = None
    ) -> tuple[list[int], tuple[PromptImage, ...]]:
        """Return a prompt's token ids and its images, checked."""
        if not isinstance(prompt, str | Iterable) or isinstance(prompt, bytes | dict):
            raise GenerationError(f"the prompt is {prompt!r}, expected a text or token ids")
        found, seen = prepared(self.images, prompt, images, self.encode, self._token)
        tokens = self._model.check_tokens(found).tolist()
        if not tokens:
            raise GenerationError("the prompt is empty, expected at least one token")
        if len(tokens) > self.context_length:
            raise GenerationError(
                f"the prompt has {len(tokens)} tokens, the context is {self.context_length}; "
                f"shorten it, or load with context_length up to "
                f"{self.manifest.model['context_length']}"
            )
        return tokens, seen

    def _token(self, token: int) -> str:
        return str(self.tokenizer.id_to_token(token))
