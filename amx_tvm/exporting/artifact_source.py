"""A compiled artifact, read back as a model: its codes and scales, not its rounded values.

Compiling this source for another target in the same format repeats no quantization: the packed
arrays are unpacked to the codes and scales that were quantized once, and packed again in the
target's layout. Merged and interleaved parameters are taken apart by their names::

    model.layers.0.mlp.gate_proj+up_proj.weight.interleaved.codes
                       |________parts_________|            |_ array of the packed layout
"""

from __future__ import annotations

import os
import shutil
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import numpy as np

from amx_tvm import formats
from amx_tvm.artifact import Manifest, open_parameters
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ArtifactError, ModelError
from amx_tvm.formats import Quantized, packing
from amx_tvm.frontends import ModelSource
from amx_tvm.models import find

TILE = 16
_INTERLEAVED, _DENSE = ".interleaved", ".dense16"
_PARTS = (".codes", ".scales", ".tile_scale")


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
                f"{self.path} is a compiled function; export it from its model instead"
            )
        if manifest.target.device != "cpu":
            raise ArtifactError(
                f"{self.path} was compiled for {manifest.target.key}; its parameters are rounded "
                "to float16 and in the GPU's layout: export from the model, or from a CPU artifact"
            )
        model = manifest.model
        self.name, self.config = str(model["name"]), dict(model["config"])
        self.generation_config = {
            "eos_token_id": list(model["eos_token_ids"]),
            "bos_token_id": model.get("bos_token_id"),
            "prompt_prefix": manifest.prompt_prefix,
        }
        self._arrays = open_parameters(self.path, manifest.parameters)
        family = find(self.config)
        network = family.build(family.configure(self.config))
        self._shapes = {
            name: tuple(int(v) for v in parameter.shape)
            for name, parameter in network.named_parameters()
        }
        self._stems = self._find_stems()

    @property
    def quantization(self) -> QuantizationConfig:
        """The settings that the artifact was compiled with."""
        stored = self.manifest.quantization
        known = {field.name for field in fields(QuantizationConfig)}
        given = {name: value for name, value in stored.items() if name in known}
        return QuantizationConfig(**{**given, "ignored": tuple(stored["ignored"])})

    def names(self) -> list[str]:
        """Return the names of the model's weights."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Return the number format that a weight is stored in."""
        return self._format(self._stems[name][0]) or "f32"

    def load(self, name: str) -> np.ndarray:
        """Return a weight as float32; a quantized one is decoded."""
        quantized = self.load_raw(name)
        if quantized is not None:
            return quantized.format.dequantize(quantized)
        stem, members = self._stems[name]
        return np.array(self._rows(name, members, self._plain(stem)), np.float32)

    def load_raw(self, name: str) -> Quantized | None:
        """Return a weight's stored codes and scales; None for a float32 weight."""
        stem, members = self._stems[name]
        if not self._format(stem):
            return None
        whole = self._unpacked(stem)

        def part(array: np.ndarray) -> np.ndarray:
            return self._rows(name, members, array)

        row_scale = whole.tensor_scale
        return Quantized(
            part(whole.codes),
            {key: part(stored) for key, stored in whole.scales.items()},
            whole.format,
            None if row_scale is None else part(np.asarray(row_scale)),
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
        return str(self.manifest.model["source_digest"])

    def _find_stems(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Map every weight to the parameter stem that holds it and the stem's members in order."""
        found: dict[str, tuple[str, tuple[str, ...]]] = {}
        for parameter in self.manifest.parameters.order:
            stem = parameter
            for suffix in (*_PARTS, _DENSE):
                stem = stem.removesuffix(suffix)
            members = self._members(stem.removesuffix(_INTERLEAVED))
            for name in members:
                found[name] = (stem, members)
        missing = [name for name in self._shapes if name not in found]
        if missing:
            raise ModelError(f"{self.path} holds no parameter for the weight {missing[0]!r}")
        return found

    def _members(self, stem: str) -> tuple[str, ...]:
        """Take a merged name apart; the inverse of relax_passes.recipes.join_names."""
        if stem in self._shapes:
            return (stem,)
        whole = tuple(stem.split("+"))
        if all(name in self._shapes for name in whole):
            return whole
        columns = [part.split("+") for part in stem.split(".")]
        count = max(map(len, columns))
        names = tuple(
            ".".join(column[i if len(column) > 1 else 0] for column in columns)
            for i in range(count)
            if all(len(column) in (1, count) for column in columns)
        )
        if not names or any(name not in self._shapes for name in names):
            raise ModelError(f"{self.path}: parameter {stem!r} belongs to no weight of the model")
        return names

    def _format(self, stem: str) -> str:
        """Return the format of a quantized parameter, or "" for a float32 one."""
        if f"{stem}.codes" not in self._arrays:
            return ""
        layer = self._members(stem.removesuffix(_INTERLEAVED))[0].removesuffix(".weight")
        config = self.quantization
        table = config.table(layer)
        return table if table != "none" else config.linear(layer).format

    def _matrix_shape(self, stem: str) -> tuple[int, ...]:
        shapes = [self._shapes[name] for name in self._members(stem.removesuffix(_INTERLEAVED))]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @lru_cache(maxsize=1)  # noqa: B019 - one origin; q, k and v are asked for one after the other
    def _unpacked(self, stem: str) -> Quantized:
        arrays = {
            part[1:]: self._arrays[stem + part] for part in _PARTS if stem + part in self._arrays
        }
        n, k = self._matrix_shape(stem)
        fmt = formats.get(self._format(stem))
        whole = packing.unpack(fmt, arrays, "tile16x32", n, k)
        if not stem.endswith(_INTERLEAVED):
            return whole
        order = separated_rows(n)
        scales = {key: stored[order] for key, stored in whole.scales.items()}
        scale = whole.tensor_scale
        return Quantized(
            whole.codes[order], scales, fmt, None if scale is None else np.asarray(scale)[order]
        )

    def _plain(self, stem: str) -> np.ndarray:
        """Return a float32 parameter in its natural layout, members stacked along axis 0."""
        if stem + _DENSE in self._arrays:
            n, k = self._matrix_shape(stem)
            array = self._arrays[stem + _DENSE].transpose(0, 2, 1).reshape(-1, k)[:n]
        else:
            array = self._arrays[stem]
        return array[separated_rows(len(array))] if stem.endswith(_INTERLEAVED) else array

    def _rows(self, name: str, members: tuple[str, ...], array: np.ndarray) -> np.ndarray:
        """Cut one member's rows out of an array over all members."""
        start = 0
        for member in members:
            rows = self._shapes[member][0]
            if member == name:
                return np.ascontiguousarray(array[start : start + rows])
            start += rows
        raise KeyError(name)


def separated_rows(rows: int) -> np.ndarray:
    """Return the row order that undoes interleaving in tiles: first all gate rows, then all up."""
    tiles = np.arange(rows).reshape(rows // 2 // TILE, 2, TILE)
    return tiles.transpose(1, 0, 2).reshape(-1)
