"""The engine of a model that makes embeddings: texts in, vectors out.

    engine = amx_tvm.load("dist/minilm")
    vectors = engine.embed(["one text", "another"], prompt_name="query")

Texts lie one behind the other in one call of the compiled function, which attends inside each:
nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amx_tvm.artifact import Manifest
from amx_tvm.embedding import EmbeddingSettings
from amx_tvm.errors import GenerationError
from amx_tvm.runtime import options as checks
from amx_tvm.runtime.inputs import Vector
from amx_tvm.runtime.own_thread import OwnThread
from amx_tvm.runtime.tokenizer import load_tokenizer
from amx_tvm.runtime.vm import Memory, VirtualMachine
from amx_tvm.schema import conform

PACKED_ROWS = 1024  # tokens of one call, but for a text that is longer
DEVICE_ROWS = 16384  # the same on GPUs

Text = str | Sequence[int]


class EmbeddingEngine(OwnThread):
    """A loaded model of embeddings. Made by `load`; any thread may use it.

    Attributes
    ----------
    manifest : Manifest
        What the artifact says about itself.
    settings : EmbeddingSettings
        How texts become vectors: pooling, prompts, the longest text.
    dimension : int
        Length of a vector.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        machine: VirtualMachine,
        memory: Memory,
        threads: int | None = None,
    ):
        self.path, self.manifest = path, manifest
        self.settings: EmbeddingSettings = conform(EmbeddingSettings, manifest.model["embedding"])
        self.dimension = int(manifest.model["dimension"])
        self._vocabulary = int(manifest.model["vocab_size"])
        self._machine = machine
        self._embed = machine.function(manifest.functions[0])
        self._parameters = machine.load_parameters(path, manifest, memory)
        self._tokenizer: Any = None
        self._vectors = [Vector(machine) for _ in range(4)]
        super().__init__(machine, threads)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, a `tokenizers.Tokenizer`, which cuts texts at the longest."""
        if self._tokenizer is None:
            tokenizer = load_tokenizer(self.path)
            tokenizer.enable_truncation(self.settings.max_tokens)
            self._tokenizer = tokenizer
        return self._tokenizer

    def embed(
        self,
        texts: str | Iterable[Text],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> np.ndarray:
        """Make the vectors of texts.

        Parameters
        ----------
        texts : str, or iterable of str or of token ids
            Token ids are taken as they are: no prompt, no special tokens.
        prompt_name : str, optional
            Which of the model's own prompts is put in front of every text, such as "query"; by
            default the one that the model names, if any.
        prompt : str, optional
            A text to put there instead; "" for none.
        dimensions : int, optional
            Keep so many of a vector's first values and give it its length again.
        truncate : bool
            Cut texts that are too long, as sentence-transformers does; otherwise they are refused.

        Returns
        -------
        ndarray
            float32 [texts, dimension]; [dimension] for one text.

        Raises
        ------
        GenerationError
            An unknown prompt, a text that is empty or too long, or an option out of range.
        """
        single = isinstance(texts, str)
        given = [texts] if isinstance(texts, str) else texts
        tokens, skipped = self.encode(given, prompt_name, prompt, truncate)
        made = self.vectors(tokens, skipped, dimensions)
        return made[0] if single else made

    def encode(
        self,
        texts: Iterable[Text],
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate: bool = False,
    ) -> tuple[list[list[int]], int]:
        """Return the token ids of texts, and how many of each are a prompt that is not averaged.

        Parameters and errors are those of `embed`.
        """
        front = self._prompt(prompt_name, prompt)
        given = list(texts)
        words = [self._text(index, text, front) for index, text in enumerate(given)]
        plain = [text for text in words if isinstance(text, str)]
        encoded = iter(self._encoded(plain, truncate))
        tokens = [next(encoded) if isinstance(text, str) else text for text in words]
        for index, ids in enumerate(tokens):
            if not ids:
                raise GenerationError(f"text {index} has no tokens, expected at least one")
            if len(ids) > self.settings.max_tokens:
                raise self._too_long(index, len(ids))
        skipped = 0
        if front and plain and self.settings.pooling == "mean" and not self.settings.include_prompt:
            alone = self.tokenizer.encode(front)
            skipped = len(alone.ids) - (alone.special_tokens_mask[-1] if alone.ids else 0)
        return tokens, skipped

    def vectors(
        self, tokens: Sequence[Sequence[int]], skipped: int = 0, dimensions: int | None = None
    ) -> np.ndarray:
        """Return the vectors, float32 [texts, dimension], of what `encode` returned."""
        width = self.dimension
        if dimensions is not None:
            width = checks.number(1, self.dimension, whole=True, note=", the model's own")(
                "dimensions", dimensions
            )
        found = np.empty((len(tokens), width), np.float32)
        most = PACKED_ROWS if self._machine.is_cpu else DEVICE_ROWS
        for places in _packs([len(ids) for ids in tokens], most):
            made = self._worker.call(self._run, [tokens[i] for i in places], skipped)
            found[places] = made[:, :width]
        if self.settings.normalize:
            lengths = np.linalg.norm(found, axis=1, keepdims=True)
            found /= np.maximum(lengths, 1e-12)
        return found

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        """Return what is put in front of every text."""
        prompts: Mapping[str, str] = self.settings.prompts
        if prompt is not None:
            if name is not None:
                raise GenerationError("prompt and prompt_name were given, expected one of them")
            return checks.text("prompt", prompt)
        name = self.settings.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in prompts:
            known = ", ".join(map(repr, prompts)) or "none: the model has no prompts"
            raise GenerationError(f"prompt_name is {name!r}, expected one of {known}")
        return prompts[name]

    def _text(self, index: int, text: Any, front: str) -> str | list[int]:
        """Return a text with its prompt, or token ids as a list; checked."""
        if isinstance(text, str):
            checks.text(f"text {index}", text)
            whole = front + text
            return whole.lower() if self.settings.lower_case else whole
        if not isinstance(text, Iterable) or isinstance(text, bytes | dict):
            raise GenerationError(f"text {index} is {text!r:.80}, expected a text or token ids")
        ids = list(text)
        for token in ids:
            whole_number = isinstance(token, int | np.integer) and not isinstance(token, bool)
            if not whole_number or not 0 <= token < self._vocabulary:
                raise GenerationError(
                    f"text {index} has the token {token!r}, expected integers from 0 to "
                    f"{self._vocabulary - 1}"
                )
        return [int(token) for token in ids]

    def _encoded(self, texts: list[str], truncate: bool) -> Iterator[list[int]]:
        if not texts:
            return
        try:
            found = self.tokenizer.encode_batch(texts)
        except Exception as error:  # the library raises nothing else
            raise GenerationError(
                f"the model's tokenizer cannot encode the texts: {error}; give token ids, or "
                "other words"
            ) from None
        for index, encoding in enumerate(found):
            if encoding.overflowing and not truncate:
                more = sum(part.special_tokens_mask.count(0) for part in encoding.overflowing)
                raise self._too_long(index, len(encoding.ids) + more)
            yield encoding.ids

    def _too_long(self, index: int, count: int) -> GenerationError:
        return GenerationError(
            f"text {index} has {count} tokens, the model takes {self.settings.max_tokens}; shorten "
            "it, or let it be cut (truncate)"
        )

    def _run(self, tokens: list[Sequence[int]], skipped: int) -> np.ndarray:
        """Run one pack of texts (on the engine's thread)."""
        lengths = np.array([len(ids) for ids in tokens])
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        starts, ends = bounds[:-1], bounds[1:]
        first, last = {
            "cls": (starts, starts + 1),
            "mean": (np.minimum(starts + skipped, ends - 1), ends),
            "last": (ends - 1, ends),
        }[self.settings.pooling]
        ids = np.concatenate([np.asarray(one) for one in tokens])
        positions = np.arange(len(ids)) - np.repeat(starts, lengths)
        inputs = (ids, positions, bounds, np.stack([first, last], axis=1).reshape(-1))
        arguments = [vector.put(x) for vector, x in zip(self._vectors, inputs, strict=True)]
        arguments[3] = self._machine.view(arguments[3], [len(tokens), 2])
        return np.array(self._machine.to_host(self._embed(*arguments, self._parameters)))


def _packs(lengths: list[int], most: int) -> Iterator[list[int]]:
    """Divide texts into calls of about equal work, each of texts of similar length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    pack: list[int] = []
    rows = 0
    for index in order:
        if pack and rows + lengths[index] > most:
            yield pack
            pack, rows = [], 0
        pack.append(index)
        rows += lengths[index]
    if pack:
        yield pack
