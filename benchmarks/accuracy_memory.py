"""Peak memory of calibration: layers of a Llama-3-8B shape, whole or scaled down, random weights.

    python benchmarks/accuracy_memory.py --scale 2 --layers 2 --windows 6
    python benchmarks/accuracy_memory.py --scale 1 --layers 1 --windows 24

Weights are made when they are asked for, as a file's are read. Prints the resident peak after every
layer, in all and above what the process had before: it must not grow from layer to layer. With a
scale of s, matrices are smaller by s^2, and so is the peak when the windows are fewer by s.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import random_llama
import torch

from amx_tvm.calibration import RECIPES, calibrate
from amx_tvm.frontends import ModelSource


class RandomSource(ModelSource):
    """Llama-3-8B's shape with all widths divided by `scale`; a small vocabulary."""

    def __init__(self, scale: int, layers: int) -> None:
        self.name, self.generation_config = "random", {"eos_token_id": [0]}
        self.config = {
            **random_llama.SHAPE,
            "hidden_size": 4096 // scale,
            "intermediate_size": 14336 // scale,
            "num_hidden_layers": layers,
            "num_attention_heads": 32 // scale,
            "num_key_value_heads": max(1, 8 // scale),
            "head_dim": 128,
            "vocab_size": 4096,
        }
        self.shapes = {name: shape for name, _, shape in random_llama.tensors(self.config)}
        self.rng = np.random.default_rng(0)

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> str:
        return "f32"

    def load(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        array = self.rng.standard_normal(shape, np.float32)
        array *= shape[1] ** -0.5
        return array

    def load_raw(self, name: str) -> None:
        return None

    @property
    def nbytes(self) -> int:
        return sum(4 * int(np.prod(shape)) for shape in self.shapes.values())

    def write_tokenizer(self, directory: object) -> list[str]:
        return []

    def digest(self) -> str:
        return "random"


def peak() -> float:
    """Resident peak of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Calibrate and tell the peak after every layer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=2, help="divides all widths")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--windows", type=int, default=6, help="of 512 tokens")
    parser.add_argument("--format", default="amxfp4-w4a4")
    parser.add_argument("--recipe", default="best", choices=list(RECIPES))
    arguments = parser.parse_args()
    source = RandomSource(arguments.scale, arguments.layers)
    layer = sum(4 * int(np.prod(s)) for n, s in source.shapes.items() if ".layers.0." in n)
    ids = torch.randint(0, 4096, (arguments.windows, 512))
    before, began = peak(), time.perf_counter()
    print(f"one layer in float32: {layer / 2**30:.2f} GiB; before: {before:.2f} GiB", flush=True)

    def tell(_stage: str, done: int, total: int, _detail: str) -> None:
        if done:
            seconds = time.perf_counter() - began
            print(
                f"{done} of {total} layers: peak {peak():.2f} GiB, {peak() - before:.2f} above, "
                f"{seconds:.0f} s",
                flush=True,
            )

    calibrate(source, arguments.format, ids, arguments.recipe, progress=tell)


if __name__ == "__main__":
    main()
