"""Which layer of a compiled or calibrated model departs most from the float weights.

The error of a linear is ||W - Q||^2 / ||W||^2 of its weight; it needs no text, no engine and no
torch. With calibration text, `amx_tvm.calibration.sensitivity` weighs the same difference by the
inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amx_tvm import formats
from amx_tvm.frontends import ModelSource


@dataclass(frozen=True)
class LayerError:
    """Relative squared errors of one linear's weight.

    layer : index of the decoder layer, or None outside the layers
    errors : format name -> error
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    errors: dict[str, float]


def weight_errors(
    source: ModelSource,
    names: Sequence[str],
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[LayerError]:
    """Round every linear of a model to each format and report its error; one weight at a time.

    Raises
    ------
    FormatError
        For an unknown format, before any weight is read.
    """
    chosen = [formats.get(name) for name in names]
    linears = [name for name in source.names() if _is_linear(name, source)]
    for done, name in enumerate(linears):
        if progress is not None:
            progress(done, len(linears), name)
        weight = source.load(name)
        energy = float(np.square(weight, dtype=np.float64).sum()) or 1.0
        errors = {
            fmt.name: float(
                np.square(fmt.quantize_dequantize(weight, name=name) - weight).sum(dtype=np.float64)
            )
            / energy
            for fmt in chosen
        }
        yield LayerError(name, _layer(name), weight.shape, errors)


def output_errors(
    source: ModelSource,
    names: Sequence[str],
    text: Any,
    progress: Callable[[str, int, int, str], None] | None = None,
) -> list[LayerError]:
    """Relative squared error of every linear's output when it alone is rounded.

    The sensitivity that mixed precision goes by; linears of one input (q, k, v; gate, up) count as
    one. Needs torch.

    Parameters
    ----------
    source : the float model
    names : 4-bit formats
    text : path of calibration text
    progress : called with (stage, done, total, detail)
    """
    from amx_tvm.calibration.api import sensitivity_report

    return [
        LayerError(f"model.layers.{u.layer}.{u.stage}", u.layer, (u.weights,), u.errors)
        for u in sensitivity_report(source, names, text, progress)
    ]


def by_layer(errors: Sequence[LayerError], name: str) -> list[float]:
    """Mean error of each decoder layer under a format, weighted by the weights' sizes."""
    sums: dict[int, list[float]] = {}
    for error in errors:
        if error.layer is not None:
            total = sums.setdefault(error.layer, [0.0, 0.0])
            size = float(np.prod(error.shape))
            total[0] += error.errors[name] * size
            total[1] += size
    return [sums[layer][0] / sums[layer][1] for layer in sorted(sums)]


def _is_linear(name: str, source: ModelSource) -> bool:
    inside = _layer(name) is not None
    return inside and name.endswith(".weight") and len(source.shape(name)) == 2


def _layer(name: str) -> int | None:
    parts = name.split(".")
    if "layers" not in parts:
        return None
    index = parts[parts.index("layers") + 1]
    return int(index) if index.isdigit() else None
