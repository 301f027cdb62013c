"""A compiled artifact, read back as a model: its codes and scales, not its rounded values.

Compiling this source for another target in the same format repeats no quantization: the packed
arrays are unpacked to the codes and scales that were quantized once, and packed again in the
target's layout. The manifest's recipes say which weights a parameter was made of, and how.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import numpy as np

from amx_tvm.artifact import Manifest, open_parameters
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ArtifactError, FormatError, ModelError
from amx_tvm.formats import Quantized, packing
from amx_tvm.frontends import ModelSource
from amx_tvm.frontends.fields import check_fields
from amx_tvm.models import find, moe
from amx_tvm.schema import Mismatch, conform
from relax_passes.recipes import Recipe, from_json


class ArtifactSource(ModelSource):
    """The weights of an artifact.

    Parameters
    ----------
    path : path-like
        An artifact of a language model for a CPU; the caller has verified it.

    Raises
    ------
    ArtifactError
        For a compiled function, or a layout that cannot be taken apart.
    """

    module_names = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        manifest = self.manifest = Manifest.load(self.path)
        if manifest.kind != "causal_lm":
            raise ArtifactError(
                f"{self.path} is of the kind {manifest.kind}; bundles are made of language models' "
                "artifacts, or of a model"
            )
        if manifest.target.device != "cpu":
            raise ArtifactError(
                f"{self.path} was compiled for {manifest.target.key}; its parameters are rounded "
                "to float16 and in the GPU's layout: export from the model, or from a CPU artifact"
            )
        model = manifest.model
        self.name, self.config = str(model["name"]), dict(model["config"])
        if "adapters" in model:
            raise ModelError(
                f"{self.path} keeps adapters apart, which no bundle runs; export a model with one "
                "merged (compile --adapter)"
            )
        self.generation_config = {
            "eos_token_id": list(model["eos_token_ids"]),
            "bos_token_id": model.get("bos_token_id"),
            "prompt_prefix": manifest.prompt_prefix,
        }
        self._arrays = open_parameters(self.path, manifest.parameters)
        family = find(check_fields(self.config, self.path))
        decoder = family.configure(self.config)
        parameters = family.build(decoder).named_parameters()
        shapes = {name: tuple(int(v) for v in p.shape) for name, p in parameters}
        self._shapes, _ = moe.unstacked(shapes, decoder)
        try:
            self._recipes = from_json(manifest.recipes)
        except Mismatch as problem:
            raise ArtifactError(f"{self.path}: {problem}; compile the model again") from None
        self._origins = {s: r.origin for r in self._recipes.values() for s in r.sources}
        missing = [name for name in self._shapes if name not in self._origins]
        if missing:
            raise ModelError(f"{self.path} holds no parameter for the weight {missing[0]!r}")

    @property
    def quantization(self) -> QuantizationConfig:
        """The settings that the artifact was compiled with."""
        stored = self.manifest.quantization
        known = {field.name for field in fields(QuantizationConfig)}
        given = {name: value for name, value in stored.items() if name in known}
        try:
            return QuantizationConfig.parse(conform(QuantizationConfig, given, "quantization"))
        except (Mismatch, FormatError) as problem:
            raise ArtifactError(f"{self.path}: {problem}; compile the model again") from None

    def names(self) -> list[str]:
        """Return the names of the model's weights."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Return the number format that a weight is stored in."""
        return self._origins[name].format or "f32"

    def load(self, name: str) -> np.ndarray:
        """Return a weight as float32; a quantized one is decoded."""
        quantized = self.load_raw(name)
        if quantized is not None:
            return quantized.format.dequantize(quantized)
        origin = self._origins[name]
        array = self._rows(name, self._floats(origin))
        return np.array(array.T if origin.transpose else array, np.float32)

    def load_raw(self, name: str) -> Quantized | None:
        """Return a weight's stored codes and scales; None for a float32 weight."""
        origin = self._origins[name]
        if not origin.format:
            return None
        whole = self._quantized(origin)
        row_scale = whole.tensor_scale
        return Quantized(
            self._rows(name, whole.codes),
            {key: self._rows(name, stored) for key, stored in whole.scales.items()},
            whole.format,
            None if row_scale is None else self._rows(name, np.asarray(row_scale)),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all stored parameters."""
        return self.manifest.parameters.bytes

    def write_tokenizer(self, directory: str | os.PathLike[str]) -> list[str]:
        """Copy the tokenizer's files."""
        names: list[str] = [
            n for n in ("tokenizer.json", "tokenizer_config.json") if n in self.manifest.files
        ]
        for name in names:
            shutil.copyfile(self.path / name, Path(directory) / name)
        return names

    def digest(self) -> str:
        """Return the identity of the model that the artifact was compiled from."""
        return str(self.manifest.model.get("source_digest", ""))

    def _parts(self, origin: Recipe) -> dict[str, np.ndarray]:
        """Return the stored arrays of an origin, by part."""
        made = {r.part: name for name, r in self._recipes.items() if r.origin == origin}
        return {part: self._arrays[name] for part, name in made.items()}

    def _size(self, origin: Recipe) -> tuple[int, ...]:
        """Return the shape of an origin's sources joined along axis 0."""
        shapes = [self._shape_in(origin, name) for name in origin.sources]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _shape_in(self, origin: Recipe, name: str) -> tuple[int, ...]:
        shape = self._shapes[name]
        return shape[::-1] if origin.transpose else shape

    @lru_cache(maxsize=1)  # noqa: B019 - one origin; q, k and v are asked for one after the other
    def _quantized(self, origin: Recipe) -> Quantized:
        """Return the codes and scales of an origin, its sources one behind the other."""
        n, k = self._size(origin)
        whole = packing.unpack(origin.format, self._parts(origin), origin.layout, n, k)
        if not origin.interleave:
            return whole
        order = separated_rows(n, origin.interleave)
        scales = {key: stored[order] for key, stored in whole.scales.items()}
        scale = None if whole.tensor_scale is None else np.asarray(whole.tensor_scale)[order]
        return Quantized(whole.codes[order], scales, whole.format, scale)

    def _floats(self, origin: Recipe) -> np.ndarray:
        """Return a float32 parameter in its natural layout, its sources one behind the other."""
        parts = self._parts(origin)
        if origin.layout:
            array = packing.unpack_floats(parts, origin.layout, *self._size(origin))
        else:
            (array,) = parts.values()
        if not origin.interleave:
            return array
        return array[separated_rows(len(array), origin.interleave)]

    def _rows(self, name: str, array: np.ndarray) -> np.ndarray:
        """Cut one source's rows out of an array over all sources of its origin."""
        origin, start = self._origins[name], 0
        for source in origin.sources:
            rows = self._shape_in(origin, source)[0]
            if source == name:
                return np.ascontiguousarray(array[start : start + rows])
            start += rows
        raise KeyError(name)


def separated_rows(rows: int, tile: int) -> np.ndarray:
    """Return the row order that undoes interleaving in tiles: first all gate rows, then all up."""
    tiles = np.arange(rows).reshape(rows // 2 // tile, 2, tile)
    return tiles.transpose(1, 0, 2).reshape(-1)
