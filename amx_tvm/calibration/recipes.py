"""Recipes: which calibration steps are taken, in which order, with which settings.

A recipe is a tuple of steps, each a frozen dataclass. Steps act in a fixed order, because each
builds on what the ones before it leave behind:

    rotate   RotateValues      float weights are changed without changing the network
    smooth   Smooth            the same, by what the calibration text shows
    choose   MixedPrecision    formats are assigned to linears
    round    Plain | Gptq      every linear is rounded, layer by layer
    train    Train             scales and roundings of all layers are trained together

All of them end in the format's own bits: codes, group scales, one tensor scale where the format
has one. Norm weights stay float32; Smooth changes them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from amx_tvm.errors import CalibrationError


@dataclass(frozen=True)
class RotateValues:
    """Rotate every head's values by a Hadamard matrix, and o_proj's columns back.

    Softmax mixes whole value vectors, so a rotation inside a head passes through attention
    unchanged; it spreads outliers among the inputs of o_proj. Exact but for float32 rounding.
    """

    ORDER = 0


@dataclass(frozen=True)
class Smooth:
    """Divide loud input channels and multiply the weights that read them (SmoothQuant's exchange).

    norm, hidden : power of a channel's rms to divide by; `norm` for the inputs of q, k, v, gate
        and up (folded into the norm weights), `hidden` for down_proj's (into up_proj's rows)
    """

    norm: float = 0.3
    hidden: float = 0.3
    ORDER = 1


@dataclass(frozen=True)
class MixedPrecision:
    """Give the linears that gain most a better format, within a budget of bits a weight.

    bits : mean stored bits a weight of all calibrated linears that the result may have
    better : the better format; its linears keep their activation scheme only where both formats
        can have it
    """

    bits: float = 4.75
    better: str = "int8"
    ORDER = 2


@dataclass(frozen=True)
class Plain:
    """Round to nearest; with `search`, scales that minimize the input-weighted error."""

    search: bool = False
    ORDER = 3


@dataclass(frozen=True)
class Gptq:
    """GPTQ with the scales chosen inside; parameters as in `amx_tvm.calibration.gptq.gptq`.

    correction : 0 rounds the float weight, 1 the weight that best maps the quantized network's
        inputs to the float network's outputs
    """

    damping: float = 0.01
    ordered: bool = True
    search: str = "diagonal"
    keep: int = 3
    correction: float = 0.0
    ORDER = 3


@dataclass(frozen=True)
class Train:
    """Train all scales and roundings against the float model's distribution; see `train`.

    windows : windows of text to train on, each as long as the recipe's
    epochs : times that each of them is seen
    batch, at_once : windows of a step, and of one pass through the network
    recompute : a layer's activations are computed again for its gradient: one layer's memory in
        place of all layers', a third more time
    rate, scale_rate : Adam's, in units of a group's scale, and in powers of two of a scale
    """

    windows: int = 4800
    epochs: int = 1
    batch: int = 8
    at_once: int = 8
    recompute: bool = False
    rate: float = 3e-3
    scale_rate: float = 3e-3
    ORDER = 4

    def __post_init__(self) -> None:
        if self.at_once < 1 or self.batch % self.at_once:
            raise CalibrationError(
                f"Train has batch={self.batch} and at_once={self.at_once}; expected a batch "
                "that is a multiple of the windows of one pass"
            )


Step = RotateValues | Smooth | MixedPrecision | Plain | Gptq | Train


@dataclass(frozen=True)
class Recipe:
    """A named sequence of steps and the calibration text's size in tokens.

    Raises
    ------
    CalibrationError
        When steps are out of order, doubled, or none of them rounds.
    """

    name: str
    steps: tuple[Step, ...]
    windows: int = 24
    window: int = 512

    def __post_init__(self) -> None:
        orders = [step.ORDER for step in self.steps]
        if orders != sorted(set(orders)) or Plain.ORDER not in orders:
            given = ", ".join(type(step).__name__ for step in self.steps) or "no steps"
            raise CalibrationError(
                f"recipe {self.name!r} has {given}; expected at most one of each kind in the order "
                "RotateValues, Smooth, MixedPrecision, Plain or Gptq (required), Train"
            )

    def find(self, kind: type) -> Any:
        """Return the step of a class, or None."""
        return next((step for step in self.steps if isinstance(step, kind)), None)

    def with_step(self, **changes: Any) -> Recipe:
        """Return a copy whose steps that have the named fields take the given values.

        Raises
        ------
        CalibrationError
            When no step has such a field.
        """
        known = {f.name for step in self.steps for f in fields(step)}
        for name in changes:
            if name not in known:
                raise CalibrationError(
                    f"recipe {self.name!r} has no setting {name!r}; it has: "
                    + ", ".join(sorted(known))
                )
        steps = tuple(
            replace(s, **{f.name: changes[f.name] for f in fields(s) if f.name in changes})
            for s in self.steps
        )
        return replace(self, steps=steps)

    def describe(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready values, for the manifest."""
        return {
            "name": self.name,
            "tokens": self.windows * self.window,
            "steps": [
                {"step": type(s).__name__, **{f.name: getattr(s, f.name) for f in fields(s)}}
                for s in self.steps
            ],
        }


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("plain", (Plain(),)),
        Recipe("search", (Plain(search=True),)),
        Recipe("gptq", (Gptq(),)),
        Recipe("smooth", (RotateValues(), Smooth(), Plain())),
        Recipe("best", (RotateValues(), Smooth(), Gptq())),
        Recipe("train", (RotateValues(), Smooth(), Plain(search=True), Train())),
    )
}


def get(name: str | Recipe) -> Recipe:
    """Return a recipe by name; a Recipe is returned as it is.

    "best:48" is recipe "best" with 48 windows of calibration text instead of its own number.

    Raises
    ------
    CalibrationError
        For an unknown name, with the known ones, or a number of windows that is none.
    """
    if isinstance(name, Recipe):
        return name
    known, colon, count = name.partition(":")
    if known not in RECIPES:
        raise CalibrationError(f"unknown recipe {known!r}; known are {', '.join(RECIPES)}")
    if not colon:
        return RECIPES[known]
    if not (count.isdecimal() and int(count)):
        raise CalibrationError(
            f"recipe {name!r} asks for {count!r} windows of calibration text; expected a positive "
            f"number, such as {known}:48"
        )
    return replace(RECIPES[known], windows=int(count))
