"""Make a compiled module's parameters out of a model's weights, one layer at a time.

The passes left a recipe for each parameter (``relax_passes.recipes``). Here the numbers follow:
load the sources, join, quantize, pack, hand to the writer, forget. Parameters of one origin (the
codes and scales of one weight) are made together, so every weight is read once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from amx_tvm import formats
from amx_tvm.artifact.manifest import TensorRecord
from amx_tvm.compiler.adapters import Adapters
from amx_tvm.compiler.balance import Balance, scaled
from amx_tvm.errors import ModelError
from amx_tvm.formats import Quantized, concatenate, packing
from amx_tvm.frontends import ModelSource
from relax_passes.recipes import Recipe, recipe_of

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Overrides:
    """Weights that a calibration made: they replace what the source would give.

    ``quantized`` holds final codes and scales by weight name (no further rounding); ``floats`` are
    float32 replacements, such as rescaled norms.
    """

    quantized: Mapping[str, Quantized]
    floats: Mapping[str, np.ndarray]


NO_OVERRIDES = Overrides({}, {})


class Materializer:
    """Turns recipes into arrays.

    Parameters
    ----------
    source : ModelSource
        Where the weights are, under the module's names.
    overrides : Overrides
        Weights from a calibration.
    adapters : Adapters, optional
        LoRA adapters that stay apart.
    balance : Balance, optional
        Factors on the rows of weights.
    """

    def __init__(
        self,
        source: ModelSource,
        overrides: Overrides = NO_OVERRIDES,
        adapters: Adapters | None = None,
        balance: Balance | None = None,
    ) -> None:
        self.source, self.overrides, self.adapters = source, overrides, adapters
        self.balance = balance

    def load(self, name: str) -> np.ndarray:
        """Load one weight as float32 (C-contiguous)."""
        array, factors = self._floats(name), self.factors(name)
        return array if factors is None else array * factors.reshape(-1, *[1] * (array.ndim - 1))

    def _floats(self, name: str) -> np.ndarray:
        """Return a weight as float32 without factors."""
        given = self.overrides.floats.get(name)
        return np.ascontiguousarray(self.source.load(name) if given is None else given, np.float32)

    def factors(self, name: str) -> np.ndarray | None:
        """Return the factors on a weight's rows, None where it stays."""
        return None if self.balance is None else self.balance.of(name)

    def quantize(self, name: str, recipe: Recipe) -> Quantized:
        """Quantize one weight, or take its codes as they are stored where formats agree."""
        factors = self.factors(name)
        made = self._quantized(name, recipe)
        return made if factors is None else scaled(made, factors)

    def _quantized(self, name: str, recipe: Recipe) -> Quantized:
        """Return a weight's codes without factors."""
        fmt = formats.get(recipe.format)
        if name in self.overrides.quantized:
            given = self.overrides.quantized[name]
            if given.format.name != fmt.name:
                raise ModelError(
                    f"{name} was calibrated as {given.format.name} but is compiled as {fmt.name}"
                )
            return given
        raw = None if recipe.transpose else self.source.load_raw(name)
        if raw is not None and raw.format.name == fmt.name:
            return raw
        array = self._floats(name)
        return fmt.quantize(array.T if recipe.transpose else array, name=name)

    def make(self, recipe: Recipe) -> dict[str, np.ndarray]:
        """Return the arrays of an origin by part; a plain float parameter has the part ""."""
        if recipe.adapter:
            if self.adapters is None:
                raise ModelError(
                    f"{recipe.sources[0]} has no adapters here; compile the model again"
                )
            rows = sum(self.source.shape(name)[0] for name in recipe.sources)
            order = interleaved_rows(rows, recipe.interleave) if recipe.interleave else None
            return {"": self.adapters.make(recipe, order, self.factors)}
        if recipe.format:
            parts = [self.quantize(name, recipe) for name in recipe.sources]
            joined = parts[0] if len(parts) == 1 else concatenate(parts)
            if recipe.interleave:
                joined = _interleave_quantized(joined, recipe.interleave, recipe.stacked)
            return packing.pack(recipe.format, joined, recipe.layout)
        arrays = [self.load(name) for name in recipe.sources]
        arrays = [a.T if recipe.transpose else a for a in arrays]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        if recipe.interleave:
            array = array[interleaved_rows(len(array), recipe.interleave, recipe.stacked)]
        if recipe.layout:
            return packing.pack_floats(array, recipe.layout)
        return {"": np.ascontiguousarray(array)}


def interleaved_rows(rows: int, tile: int, stacked: int = 1) -> np.ndarray:
    """Return the row order in which tiles of the first and of the second half alternate.

    Of several equal parts behind each other, each has halves of its own.
    """
    halves = np.arange(rows).reshape(stacked, 2, rows // stacked // 2 // tile, tile)
    return halves.transpose(0, 2, 1, 3).reshape(-1)


def _interleave_quantized(q: Quantized, tile: int, stacked: int) -> Quantized:
    order = interleaved_rows(len(q.codes), tile, stacked)
    scales = {name: stored[order] for name, stored in q.scales.items()}
    row_scale = q.tensor_scale
    if row_scale is not None and np.ndim(row_scale):
        row_scale = np.asarray(row_scale)[order]
    return Quantized(q.codes[order], scales, q.format, row_scale)


def bits_by_format(
    plan: dict[str, Recipe],
    shape: Callable[[str], tuple[int, ...]],
    stored: Mapping[str, TensorRecord],
) -> dict[str, float]:
    """Return the stored bits a weight of each number format: codes, scales, padding and all.

    Parameters
    ----------
    plan : dict
        The module's recipes.
    shape : callable
        Name of a source -> its shape.
    stored : mapping
        What was written, by parameter.
    """
    size: dict[str, int] = defaultdict(int)
    weights: dict[str, dict[Recipe, int]] = defaultdict(dict)
    for name, record in stored.items():
        recipe = recipe_of(plan, name)
        if recipe.format:
            size[recipe.format] += record.bytes
            weights[recipe.format][recipe.origin] = sum(prod(shape(s)) for s in recipe.sources)
    return {fmt: 8 * size[fmt] / sum(weights[fmt].values()) for fmt in sorted(size)}


def parameters(
    order: list[str],
    plan: dict[str, Recipe],
    materializer: Materializer,
    progress: Progress | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every parameter of the tuple by name, grouped by origin.

    Parameters
    ----------
    order : list of str
        Names of the parameters that the module takes.
    plan : dict
        The module's recipes.
    materializer : Materializer
        Makes the arrays.
    progress : callable, optional
        Called with (done, total, name) before each origin.
    """
    origins: dict[Recipe, list[str]] = {}
    for name in order:
        origins.setdefault(recipe_of(plan, name).origin, []).append(name)
    for done, (_, names) in enumerate(origins.items()):
        if progress is not None:
            progress(done, len(origins), names[0])
        arrays = materializer.make(recipe_of(plan, names[0]))
        for name in names:
            yield name, arrays[recipe_of(plan, name).part]
    if progress is not None:
        progress(len(origins), len(origins), "")
