"""LoRA adapters that an artifact keeps apart from its weights, for requests to choose among."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.frontends import ModelSource
from amx_tvm.frontends.base import sample_digest
from amx_tvm.frontends.family_source import FamilySource
from amx_tvm.frontends.lora import LoraAdapter
from amx_tvm.models import Weight
from relax_passes.adapters import AdapterPlan, Parts
from relax_passes.passes.adapt import adapted
from relax_passes.recipes import Recipe

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}")
MOST = 256  # adapters of an artifact
_MERGE = "merge it into an artifact of its own (adapter=, --adapter)"


class Adapters:
    """Adapters beside one base.

    Parameters
    ----------
    source : ModelSource
        The base's checkpoint.
    given : mapping of str to path
        The directory of each, by the name that requests call it.

    Attributes
    ----------
    names : list of str
        In the order of their numbers.

    Raises
    ------
    ModelError
        For a name that cannot be one, an adapter that does not fit the base, or one that changes
        what can only be merged.
    """

    def __init__(self, source: ModelSource, given: Mapping[str, str | os.PathLike[str]]) -> None:
        if not isinstance(given, Mapping) or not 0 < len(given) <= MOST:
            raise ModelError(
                f"adapters is {given!r}, expected 1 to {MOST} names with the directory of each"
            )
        for name in given:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ModelError(
                    f"{name!r} names an adapter; expected at most 128 letters, digits and ._:/+-, "
                    "a letter or digit first"
                )
        if source.takes_images:
            raise ModelError(f"{source.name} takes images, and keeps no adapters apart; {_MERGE}")
        self.names = list(given)
        self._each = [LoraAdapter(source, given[name]) for name in given]
        for one in self._each:
            if one.whole:
                raise ModelError(
                    f"{one.path} replaces {next(iter(one.whole))} as a whole; {_MERGE}"
                )
        self._named: FamilySource | None = None

    def digest(self) -> str:
        """Return the identity of all of them."""
        return sample_digest(*(one.digest().encode() for one in self._each))

    def plan(
        self, named: FamilySource, shapes: Mapping[str, tuple[int, ...]], dtype: str
    ) -> AdapterPlan:
        """Return which weights of a module have adapters, and how they are kept.

        Parameters
        ----------
        named : FamilySource
            The base under the module's names.
        shapes : mapping of str to tuple of int
            The module's weights.
        dtype : str
            "float16" or "float32".

        Raises
        ------
        ModelError
            For an adapter of what is no linear of the module.
        """
        self._named = named
        ranks: dict[str, int] = {}
        found: set[str] = set()
        for name in named.names():
            weight = named.weight(name)
            for one in self._each:
                if weight is not None and weight.name in one.pairs:
                    self._check(one, name, weight, shapes[name])
                    ranks[name] = max(ranks.get(name, 0), one.rank(weight.name))
                    found.add(weight.name)
        for one in self._each:
            for stored in one.pairs:
                if stored not in found:
                    raise self._refused(one, stored)
        rows = {name: shape[0] for name, shape in shapes.items()}
        return AdapterPlan(len(self._each), ranks, rows, dtype)

    def check_used(self, plan: AdapterPlan, recipes: dict[str, Recipe]) -> None:
        """Refuse an adapter of a weight that no linear of a lowered module reads as it is."""
        left = sorted(set(plan.ranks) - adapted(recipes))
        if left and self._named is not None:
            weight = self._named.weight(left[0])
            assert weight is not None
            one = next(one for one in self._each if weight.name in one.pairs)
            raise self._refused(one, weight.name)

    def make(
        self,
        recipe: Recipe,
        order: np.ndarray | None,
        balance: Callable[[str], np.ndarray | None] = lambda _: None,
    ) -> np.ndarray:
        """Return what is kept of all adapters for a linear: ``relax_passes.adapters``.

        Parameters
        ----------
        recipe : Recipe
            Of "down" or "up".
        order : ndarray or None
            Of the weight's rows, where they are interleaved.
        balance : callable
            Factors on the rows of a weight by its name, or None.
        """
        assert self._named is not None
        shapes = [self._named.shape(name) for name in recipe.sources]
        parts = Parts(tuple(s[0] for s in shapes), recipe.rank, recipe.interleave > 0)
        made = []
        for one in self._each:
            factors = [self._factors(one, name, balance(name)) for name in recipe.sources]
            if recipe.adapter == "down":
                made.append(parts.down([f and f[0] for f in factors], shapes[0][1]))
            else:
                made.append(parts.up([f and f[1] for f in factors], order))
        return np.stack(made)

    def _factors(
        self, one: LoraAdapter, name: str, balance: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return A [r, K] and B [n, r] of a module's weight, None where it has none."""
        assert self._named is not None
        weight = self._named.weight(name)
        if weight is None or weight.name not in one.pairs:
            return None
        a, b = one.factors(weight.name)
        largest = max(np.abs(a).max(initial=0), np.abs(b).max(initial=0))
        if not largest < np.finfo(np.float16).max:
            raise ModelError(
                f"{one.path} has a value of {largest:g} for {weight.name}, which float16 does not "
                f"hold; {_MERGE}"
            )
        taken = Weight(weight.name, rows=weight.rows, step=weight.step, order=weight.order).take(b)
        return a, taken if balance is None else taken * balance[:, None]

    def _check(self, one: LoraAdapter, name: str, weight: Weight, shape: tuple[int, ...]) -> None:
        """Refuse what is no matrix of its own, as the module has it."""
        turned = weight.transpose == one.swapped(weight.name)
        plain = weight.index is None and not weight.flat and not weight.offset
        if one.embeds(weight.name) or not turned or not plain or len(shape) != 2:
            raise self._refused(one, weight.name)

    def _refused(self, one: LoraAdapter, stored: str) -> ModelError:
        return ModelError(
            f"{one.path} changes {stored.removesuffix('.weight')}, which is no linear that takes "
            f"adapters apart (heads, embeddings and experts do not); {_MERGE}"
        )
