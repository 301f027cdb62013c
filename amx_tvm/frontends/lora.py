"""A LoRA adapter in PEFT's layout, and merged into its base: W + scale * B A, before rounding.

How several stay apart from the weights: ``amx_tvm.compiler.adapters``.

The base may be any checkpoint (safetensors, GGUF, quantized). Tensors that the adapter does not
change stay as they are, stored codes included; weights that it holds whole replace the base's. The
rules are those of PEFT's ``merge_and_unload``: the factor is alpha / r (rsLoRA: alpha / sqrt(r)),
and both may differ by module.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.formats.base import Quantized
from amx_tvm.frontends.base import ModelSource, sample_digest
from amx_tvm.frontends.fields import without_nulls
from amx_tvm.frontends.hf.config import read_json
from amx_tvm.frontends.hf.safetensors_file import SafetensorsFile
from amx_tvm.schema import Mismatch, Range, conform

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# A [r, in] and B [out, r] of a linear, [r, vocab] and [hidden, r] of an embedding.
_PART = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?")
# A weight that was saved whole (modules_to_save, embeddings): it takes the place of the base's.
_WHOLE = re.compile(r"(.+?)(?:\.base_layer)?\.weight")
# What PEFT can do beyond W + scale B A, with the values at which it does not.
_REFUSED = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "use_qalora": (False,),
    "alora_invocation_tokens": ([],),
    "megatron_config": ({},),
}
# A pattern of strangers is searched in bounded time: few repetitions, and none inside another.
MOST_PATTERN = 1000
_REPEATED, _SLOW = re.compile(r"[*+{]"), re.compile(r"\)[*+{]|\(\?|\\[1-9]")
# Beginnings that take the adapter out of the base's weights: it belongs to another base.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")

Rank = Annotated[int, Range(1, 1 << 16)]
Alpha = Annotated[float, Range(-1e9, 1e9)]


class AdapterConfig(TypedDict, total=False):
    """The fields of ``adapter_config.json`` that are read."""

    peft_type: str
    r: Rank
    lora_alpha: Alpha
    use_rslora: bool
    fan_in_fan_out: bool
    rank_pattern: dict[str, Rank]
    alpha_pattern: dict[str, Alpha]


class LoraAdapter:
    """An adapter, read beside the base that it changes.

    Parameters
    ----------
    source : ModelSource
        The base model.
    adapter : path-like
        Directory with adapter_config.json and adapter_model.safetensors.

    Attributes
    ----------
    file : SafetensorsFile
        Its weights.
    pairs : dict of str to tuple of str
        By the base's name of a weight: the adapter's names of A and B.
    scales : dict of str to float
        By the base's name: the factor of B A.
    whole : dict of str to str
        By the base's name: the adapter's name of a weight in its place.

    Raises
    ------
    ModelError
        For an adapter that is missing, damaged, of another kind than LoRA, or that changes what
        the base does not have.
    """

    def __init__(self, source: ModelSource, adapter: str | os.PathLike[str]) -> None:
        self.path, self.source = Path(adapter), source
        if source.kind != "causal_lm" or source.module_names:
            raise ModelError(
                f"{source.name} takes no adapter; expected the checkpoint of a language model "
                "(a Hugging Face directory or a GGUF file)"
            )
        self._settings = _settings(self.path)
        self.file = SafetensorsFile(self.path / WEIGHTS)
        self.pairs: dict[str, tuple[str, str]] = {}
        self.scales: dict[str, float] = {}
        self.whole: dict[str, str] = {}
        for module, parts in _modules(self.file).items():
            name = self._target(module)
            if "whole" in parts:
                self.whole[name] = parts["whole"]
                self._check_shape(name, module, self.file.tensors[parts["whole"]].shape)
            if "A" in parts:
                self.pairs[name] = a, b = parts["A"], parts["B"]
                self.scales[name] = self._scale(module, a, b)
                rows, columns = self.file.tensors[b].shape[0], self.file.tensors[a].shape[1]
                swapped = self.swapped(name)
                self._check_shape(name, module, (columns, rows) if swapped else (rows, columns))

    def _target(self, module: str) -> str:
        """Return the base's name of the weight that a module of the adapter changes."""
        present = set(self.source.names())
        stems = [module, module.partition(".")[2], f"model.{module}", f"transformer.{module}"]
        for stem in stems:
            if f"{stem}.weight" in present:
                return f"{stem}.weight"
        tied = ": its head is its embedding" if module.endswith("lm_head") else ""
        raise ModelError(
            f"{self.path} changes {module}, and {self.source.name} has no such weight{tied}; "
            "use the base model that the adapter was trained on"
        )

    def _scale(self, module: str, a: str, b: str) -> float:
        """Return alpha / r (or its root) of a module, by the adapter's patterns."""
        settings = self._settings
        rank = _matching(settings.get("rank_pattern", {}), module, settings.get("r", 8))
        alpha = _matching(settings.get("alpha_pattern", {}), module, settings.get("lora_alpha", 8))
        shapes = [self.file.tensors[name].shape for name in (a, b)]
        if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != rank != shapes[1][1]:
            raise ModelError(
                f"{self.file.path}: {module} has A {list(shapes[0])} and B {list(shapes[1])}; "
                f"expected [{rank}, in] and [out, {rank}], as {CONFIG} says r = {rank}"
            )
        return alpha / (rank**0.5 if settings.get("use_rslora") else rank)

    def _check_shape(self, name: str, module: str, made: tuple[int, ...]) -> None:
        if made != tuple(self.source.shape(name)):
            raise ModelError(
                f"{self.path} changes {module} by a matrix of {list(made)}, and "
                f"{self.source.name} has it as {list(self.source.shape(name))}; use the base model "
                "that the adapter was trained on"
            )

    def swapped(self, name: str) -> bool:
        """Whether B A is stored the other way round: embeddings, and linears of GPT-2."""
        return self.embeds(name) or bool(self._settings.get("fan_in_fan_out"))

    def embeds(self, name: str) -> bool:
        """Whether it changes a weight as a table of embeddings."""
        return "lora_embedding" in self.pairs[name][0]

    def rank(self, name: str) -> int:
        """Return r of a weight."""
        return self.file.tensors[self.pairs[name][0]].shape[0]

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return A [r, in] and B [out, r] of a weight as float32, the factor in B."""
        a, b = (self.file.load(part) for part in self.pairs[name])
        return a, b * np.float32(self.scales[name])

    def delta(self, name: str) -> np.ndarray:
        """Return what is added to a weight, as the base stores it."""
        a, b = self.factors(name)
        return (b @ a).T if self.swapped(name) else b @ a

    def digest(self) -> str:
        """Return the identity of base and adapter together."""
        settings = (self.path / CONFIG).read_bytes()
        return sample_digest(self.source.digest().encode(), settings, self.file.file.buffer)


class MergedLora(ModelSource):
    """A checkpoint with an adapter merged into its weights, one at a time.

    Parameters and errors are those of `LoraAdapter`.
    """

    def __init__(self, source: ModelSource, adapter: str | os.PathLike[str]) -> None:
        self.adapter = LoraAdapter(source, adapter)
        self.source, self.kind, self.module_names = source, source.kind, source.module_names
        self.name = f"{source.name}-{self.adapter.path.resolve().name}"
        self.config = source.config

    @property
    def generation_config(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's generation configuration."""
        return self.source.generation_config

    def names(self) -> list[str]:
        """Return the names of the base's tensors."""
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.source.shape(name)

    def dtype(self, name: str) -> str:
        """Return the stored type; "f32" for what is merged."""
        return "f32" if self._changes(name) else self.source.dtype(name)

    def _changes(self, name: str) -> bool:
        return name in self.adapter.pairs or name in self.adapter.whole

    def check(self, name: str) -> None:
        """Refuse a tensor that is missing or of a type that is not read, in base and adapter."""
        own = self.adapter
        if name in own.whole:
            own.file.check(own.whole[name])
        else:
            self.source.check(name)
        for part in own.pairs.get(name, ()):
            own.file.check(part)

    def same(self, first: str, second: str) -> bool:
        """Return whether two tensors hold the same numbers in the same type."""
        if self._changes(first) or self._changes(second):
            return super().same(first, second)
        return self.source.same(first, second)

    def load(self, name: str) -> np.ndarray:
        """Read one tensor as float32, merged."""
        own = self.adapter
        whole = own.whole.get(name)
        array = own.file.load(whole) if whole else self.source.load(name)
        return array + own.delta(name) if name in own.pairs else array

    def load_entry(self, name: str, index: int) -> np.ndarray:
        """Read one entry along axis 0 of a stacked tensor."""
        if self._changes(name):
            return self.load(name)[index]
        return self.source.load_entry(name, index)

    def load_raw(self, name: str) -> Quantized | None:
        """Return stored codes and scales of what the adapter leaves alone."""
        return None if self._changes(name) else self.source.load_raw(name)

    def load_raw_entry(self, name: str, index: int) -> Quantized | None:
        """Return one entry of :meth:`load_raw`."""
        return None if self._changes(name) else self.source.load_raw_entry(name, index)

    @property
    def nbytes(self) -> int:
        """Bytes of the base's tensors."""
        return self.source.nbytes

    def write_tokenizer(self, directory: str | os.PathLike[str]) -> list[str]:
        """Write the base's tokenizer."""
        return self.source.write_tokenizer(directory)

    def digest(self) -> str:
        """Return the identity of base and adapter together."""
        return self.adapter.digest()


def _settings(adapter: Path) -> dict[str, Any]:
    """Read adapter_config.json; refuse what is more than W + scale B A, by name."""
    if not (adapter / CONFIG).is_file():
        raise ModelError(
            f"{adapter} is no adapter; expected a directory with {CONFIG} and {WEIGHTS}, as PEFT's "
            "save_pretrained writes it"
        )
    given = without_nulls(read_json(adapter / CONFIG))
    try:
        settings = dict(conform(AdapterConfig, given))
    except Mismatch as problem:
        raise ModelError(f"{adapter / CONFIG}: the field {problem}") from None
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise ModelError(f"{adapter / CONFIG}: peft_type is {kind!r}; only LORA can be merged")
    start = str(settings.get("init_lora_weights", "")).lower()
    refused = {name: settings.get(name) for name in _REFUSED}
    for name, value in refused.items():
        if value is not None and value not in _REFUSED[name]:
            raise ModelError(
                f"{adapter / CONFIG}: {name} is {value!r}, which is not supported; merge the "
                "adapter with PEFT (merge_and_unload) and compile the result"
            )
    if start.startswith(_CHANGED_BASE):
        raise ModelError(
            f"{adapter / CONFIG}: init_lora_weights is {start!r}: the adapter was taken out of its "
            "base; merge it with PEFT (merge_and_unload) and compile the result"
        )
    return settings


def _modules(file: SafetensorsFile) -> dict[str, dict[str, str]]:
    """Return the names of "A" and "B", of a "whole" weight, or of all, for every module."""
    found: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        plain = name.removeprefix(_PREFIX)
        if match := _PART.fullmatch(plain):
            found.setdefault(match[1], {})[match[2]] = name
        elif match := _WHOLE.fullmatch(plain):
            found.setdefault(match[1], {})["whole"] = name
        else:
            raise ModelError(
                f"{file.path} holds {name!r}, which is no part of a LoRA adapter; merge it with "
                "PEFT (merge_and_unload) and compile the result"
            )
    for module, parts in found.items():
        if ("A" in parts) != ("B" in parts):
            raise ModelError(f"{file.path} has only lora_{min(parts)} of {module}; it is damaged")
    if not found:
        raise ModelError(f"{file.path} holds no tensors; it is no adapter")
    return found


def _matching(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """Return the value whose key is the end of a module's name (a regular expression), as PEFT."""
    for key, value in pattern.items():
        if len(key) > MOST_PATTERN or _SLOW.search(key) or len(_REPEATED.findall(key)) > 3:
            raise ModelError(
                f"{CONFIG}: the pattern {key[:80]!r} is more than the names of modules need; "
                "expected at most 3 repetitions, none of a group"
            )
        try:
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        except re.error as problem:
            raise ModelError(
                f"{CONFIG}: the pattern {key!r} is no regular expression: {problem}"
            ) from None
    return default
