"""How much each linear suffers under each format, and who gets the better one within a budget.

The measure is a linear's relative output error on the calibration text when it alone is rounded:
||(W - Q) x||^2 / ||W x||^2 with the float network's inputs x. It needs one pass of the float model
and ranks linears; it does not predict perplexity.

Linears that share an input (q, k, v; gate, up) are one unit: the compiler merges them into one
product, which needs one format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amx_tvm import formats
from amx_tvm.calibration.block import STAGES, layer_name
from amx_tvm.calibration.gptq import output_error
from amx_tvm.calibration.recipes import MixedPrecision
from amx_tvm.calibration.stream import Progress, Stream
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import CalibrationError


@dataclass(frozen=True)
class Sensitivity:
    """One unit: linears of a layer that share an input.

    linears : names without ".weight"
    weights : how many numbers they hold
    errors : format -> relative output error, joint over the linears
    """

    layer: int
    stage: str
    linears: tuple[str, ...]
    weights: int
    errors: dict[str, float]


@torch.no_grad()
def sensitivities(
    stream: Stream, names: Sequence[str], progress: Progress | None = None
) -> Iterator[Sensitivity]:
    """Measure every unit of a model under formats, layer by layer; uses up the exact stream.

    Raises
    ------
    FormatError
        For an unknown format, before anything is computed.
    """
    chosen = [formats.get(name) for name in names]
    layers = stream.decoder.num_layers
    for layer in range(layers):
        if progress is not None:
            progress("sensitivity", layer, layers, f"layer {layer}")
        weights = stream.load_layer(layer)
        for stage, batches in stream.run_exact(layer, weights).items():
            hessian = _moment(batches)
            linears = tuple(layer_name(layer, part) for part in STAGES[stage])
            stacked = torch.cat([weights[f"{part}.weight"] for part in STAGES[stage]])
            errors = {}
            for fmt in chosen:
                rounded = torch.from_numpy(fmt.quantize_dequantize(stacked.numpy()))
                errors[fmt.name] = output_error(stacked, rounded, hessian)
            yield Sensitivity(layer, stage, linears, stacked.numel(), errors)


def _moment(batches: list[Tensor]) -> Tensor:
    """Sum of x x^T over batches [..., K]."""
    total = torch.zeros(batches[0].shape[-1], batches[0].shape[-1])
    for batch in batches:
        flat = batch.reshape(-1, batch.shape[-1])
        total.addmm_(flat.T, flat)
    return total


def allocate(units: Sequence[Sensitivity], base: str, step: MixedPrecision) -> set[str]:
    """Choose the linears that get the better format.

    Units are taken in the order of error saved per added bit as long as the budget lasts.

    Parameters
    ----------
    units : measured under `base` and ``step.better``
    base : the configured format
    step : budget and better format

    Returns
    -------
    Names of linears, without ".weight".

    Raises
    ------
    CalibrationError
        When the budget is under the configured format's own bits.
    """
    low = formats.get(base).bits_per_value
    extra = formats.get(step.better).bits_per_value - low
    total = sum(unit.weights for unit in units)
    if step.bits < low or extra <= 0:
        raise CalibrationError(
            f"{base} has {low:g} bits a weight and {step.better} {low + extra:g}; expected a "
            f"budget of at least {low:g} (given {step.bits:g}) and a better format of more bits"
        )
    left, chosen = (step.bits - low) * total, set[str]()

    def saved(unit: Sensitivity) -> float:
        return (unit.errors[base] - unit.errors[step.better]) / unit.weights

    for unit in sorted(units, key=saved, reverse=True):
        if unit.weights * extra <= left and saved(unit) > 0:
            left -= unit.weights * extra
            chosen.update(unit.linears)
    return chosen


def with_formats(config: QuantizationConfig, linears: set[str], better: str) -> QuantizationConfig:
    """Return the configuration with these linears overridden; the user's overrides stay first."""
    return replace(config, overrides={**config.overrides, **dict.fromkeys(sorted(linears), better)})
