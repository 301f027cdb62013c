"""Calibration of torch modules that are no language models: GPTQ from example inputs.

The float module runs over the batches once; every linear gathers the second moments of its inputs,
linears that read the same tensor share them. Then each weight is rounded by itself. Modules have no
common structure, so the recipes' steps that change a decoder block do not apply here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amx_tvm.calibration import recipes
from amx_tvm.calibration.api import Calibration
from amx_tvm.calibration.gptq import Statistics, gptq, plain
from amx_tvm.calibration.grids import grid_of
from amx_tvm.calibration.recipes import Gptq, Plain, Recipe
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import CalibrationError

if TYPE_CHECKING:
    from amx_tvm.formats import Quantized

# Ten times the damping of language models: examples of a module are few and alike, and with less
# the rare sentence suffers (MiniLM: a cosine of 0.980 at least with 0.01, 0.985 with 0.1).
DAMPING = 0.1
BUDGET = 1 << 30  # bytes of second moments at once; more linears take another run


def calibrate_module(
    module: nn.Module,
    batches: Iterable[Sequence[Tensor]],
    config: QuantizationConfig | str = "amxfp4",
    recipe: str | Recipe | None = None,
) -> Calibration:
    """Round the linears of a module by a recipe.

    Parameters
    ----------
    module : nn.Module
        In evaluation mode and float32, as for ``amx_tvm.compile``.
    batches : iterable of sequences of tensor
        Positional inputs, each a call of the module, of any shapes that it takes. Padding counts
        like any other input, so batches of equal lengths are better than padded ones.
    config : QuantizationConfig or str
        Which linear gets which format.
    recipe : str or Recipe, optional
        One with a rounding step alone: "plain", "search" or (the default) "gptq".

    Returns
    -------
    Calibration
        Its ``quantized`` holds the rounded weights by parameter name. Linears that no batch
        reached are left to be rounded to nearest.

    Raises
    ------
    CalibrationError
        When there are no batches, or the recipe has steps for decoders.
    """
    config = QuantizationConfig.parse(config)
    chosen = recipes.get(recipe or recipes.get("gptq").with_step(damping=DAMPING))
    step = chosen.steps[-1]
    if len(chosen.steps) > 1:
        raise CalibrationError(
            f"recipe {chosen.name!r} changes decoder blocks, which {type(module).__name__} need "
            "not have; for modules choose plain, search or gptq"
        )
    calls = [tuple(batch) for batch in batches]
    if not calls:
        raise CalibrationError(
            f"calibrating {type(module).__name__} needs batches of inputs, none were given"
        )
    quantized: dict[str, Quantized] = {}
    errors: dict[str, float] = {}
    for names, statistics in _gathered(module, calls, config):
        for name in names:
            weight = module.get_parameter(f"{name}.weight").detach()
            grid = grid_of(config.linear(name).format)
            if isinstance(step, Gptq):
                result = gptq(
                    weight.clone(),
                    grid,
                    statistics.hessian,
                    damping=step.damping,
                    ordered=step.ordered,
                    search=step.search,
                    keep=step.keep,
                )
            else:
                search = isinstance(step, Plain) and step.search
                result = plain(weight, grid, statistics.hessian, search)
            quantized[f"{name}.weight"] = result.quantized
            errors[f"{name}.weight"] = result.error
    return Calibration(config, chosen, quantized, {}, errors)


def _gathered(
    module: nn.Module, calls: list[tuple], config: QuantizationConfig
) -> Iterator[tuple[list[str], Statistics]]:
    """Yield linears that read the same tensor, with the statistics of their input."""
    wanted: dict[str, nn.Linear] = {}
    seen: set[int] = set()
    for name, part in module.named_modules():
        if not isinstance(part, nn.Linear) or part.weight.data_ptr() in seen:
            continue
        seen.add(part.weight.data_ptr())
        chosen = config.linear(name).format
        if chosen != "none":
            wanted[name] = part
    groups = _groups(module, wanted, calls[0])
    while groups:
        taken: list[list[str]] = []
        size = 0
        while groups and (not taken or size < BUDGET):
            taken.append(groups.pop(0))
            size += 4 * wanted[taken[-1][0]].in_features ** 2
        found = {g[0]: Statistics.empty(wanted[g[0]].in_features, False) for g in taken}

        def gather(name: str, x: Tensor, found: dict[str, Statistics] = found) -> None:
            found[name].add(x, x)

        for call in calls:
            _run(module, {name: wanted[name] for name in found}, call, gather)
        for group in taken:
            if found[group[0]].tokens:
                yield group, found[group[0]]


def _groups(module: nn.Module, linears: Mapping[str, nn.Linear], call: tuple) -> list[list[str]]:
    """Put linears together that read one tensor, by running one batch."""
    inputs: list[Tensor] = []
    groups: list[list[str]] = []

    def note(name: str, x: Tensor) -> None:
        if any(name in group for group in groups):  # called again: its inputs are its own
            return
        for known, group in zip(inputs, groups, strict=True):
            if known is x:
                group.append(name)
                return
        inputs.append(x)
        groups.append([name])

    _run(module, linears, call, note)
    return groups


def _run(module: nn.Module, linears: Mapping[str, nn.Linear], call: tuple, each: Any) -> None:
    """Call the module; ``each`` gets the name and input of every call of a linear."""
    with ExitStack() as hooks, torch.no_grad():
        for name, part in linears.items():

            def hook(_module: nn.Module, inputs: tuple, name: str = name) -> None:
                each(name, inputs[0])

            hooks.callback(part.register_forward_pre_hook(hook).remove)
        module(*call)
