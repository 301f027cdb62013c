"""The parameter plan: how each parameter of the compiled module is made from the model's weights.

Passes rename, merge and quantize weights symbolically; nothing is loaded while they run. What has
to happen to the numbers is written down here, one :class:`Recipe` a parameter, and carried as the
module attribute ``amx.parameters``. Afterwards the compiler streams: for each recipe it loads the
sources, joins, quantizes, packs and writes, so that only one layer is ever in memory. The manifest
keeps the recipes of what was written, so that a weight can be found again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import tvm

from amx_tvm.schema import conform

ATTRIBUTE = "amx.parameters"


@dataclass(frozen=True)
class Recipe:
    """How one parameter comes to be.

    Parameters
    ----------
    sources : tuple of str
        Weights of the model, joined along axis 0 in this order.
    transpose : bool
        The sources are [K, N] and are transposed first.
    interleave : int
        0, or the tile height: the two equal halves of the rows alternate in tiles of this many.
    stacked : int
        How many equal parts lie behind each other, each of two halves.
    format, layout, part : str
        For quantized weights: the number format, the packed layout and which of its arrays.
        An empty format is a float32 parameter.
    adapter, rank : str, int
        "down" or "up" for what LoRA adapters add to the sources, with so many rows of A each;
        see ``relax_passes.adapters``.
    """

    sources: tuple[str, ...]
    transpose: bool = False
    interleave: int = 0
    stacked: int = 1
    format: str = ""
    layout: str = ""
    part: str = ""
    adapter: str = ""
    rank: int = 0

    @property
    def origin(self) -> Recipe:
        """The recipe without its part: parameters of one origin are packed together."""
        return replace(self, part="")

    def to_json(self) -> dict[str, Any]:
        """Return the one JSON form: what is not its default."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {f.name: kept[f.name] for f in fields(self) if kept[f.name] != f.default}
        return {**kept, "sources": list(self.sources)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Recipe:
        """Read what ``to_json`` wrote; raises Mismatch for anything else."""
        return conform(Recipe, data, "recipe")


def read(module: tvm.IRModule) -> dict[str, Recipe]:
    """Return the plan of a module; a parameter that is not in it is a weight as it is."""
    attrs = module.attrs
    if attrs is None or ATTRIBUTE not in attrs:
        return {}
    return from_json(json.loads(str(attrs[ATTRIBUTE])))


def write(module: tvm.IRModule, plan: dict[str, Recipe]) -> tvm.IRModule:
    """Return the module with this plan attached."""
    return module.with_attr(ATTRIBUTE, json.dumps(to_json(plan)))


def to_json(plan: Mapping[str, Recipe]) -> dict[str, Any]:
    """Return a plan as module attributes and manifests hold it."""
    return {name: recipe.to_json() for name, recipe in sorted(plan.items())}


def from_json(data: Mapping[str, Any]) -> dict[str, Recipe]:
    """Read what ``to_json`` wrote."""
    return {name: Recipe.from_json(recipe) for name, recipe in data.items()}


def recipe_of(plan: dict[str, Recipe], name: str) -> Recipe:
    """Return the recipe of a parameter; the identity where the plan has none."""
    return plan.get(name, Recipe((name,)))


def join_names(names: list[str]) -> str:
    """Name a merged parameter: the common prefix, the differing parts joined by "+", the suffix."""
    if len(names) == 1:
        return names[0]
    parts = [n.split(".") for n in names]
    if len({len(p) for p in parts}) > 1:
        return "+".join(names)
    joined = []
    for column in zip(*parts, strict=True):
        joined.append(column[0] if len(set(column)) == 1 else "+".join(column))
    return ".".join(joined)
