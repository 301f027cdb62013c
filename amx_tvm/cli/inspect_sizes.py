"""What a manifest says of sizes: bytes and bits by layer, and the floor of a decode step."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from amx_tvm.artifact import Manifest
from relax_passes.chosen import ChosenKernel

LAYER = re.compile(r"\.(\d+)\.")
# The parts of a layer, by what their tensors' names hold; the first that fits.
PARTS = {
    "adapters": ("adapters.",),
    "attention": ("attn", "attention", "q_proj", "o_proj"),
    "MLP": ("mlp", "experts", "gate_proj", "down_proj", "fc"),
    "other": ("",),
}
SEQUENCES = (1, 8, 64)


@dataclass
class LayerSize:
    """One layer, or what is outside them.

    Attributes
    ----------
    name : str
        "layer 3", or a tensor's name.
    parts : dict of str to int
        Bytes by part.
    weights, coded : int
        Weights of its linears, and the bytes of their codes and scales.
    """

    name: str
    parts: dict[str, int] = field(default_factory=dict)
    weights: int = 0
    coded: int = 0

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    @property
    def bits(self) -> float | None:
        """Bits a weight of its linears, scales included; None where it has none."""
        return 8 * self.coded / self.weights if self.weights else None


def layer_sizes(manifest: Manifest, linears: list[ChosenKernel]) -> list[LayerSize]:
    """Return the layers in their order, and before them what is outside, the largest first."""
    found: dict[str, LayerSize] = {}

    def of(name: str) -> LayerSize:
        layer = LAYER.search(name)
        key = f"layer {layer[1]}" if layer else name.partition(".weight")[0]
        return found.setdefault(key, LayerSize(key))

    for name, tensor in manifest.parameters.tensors.items():
        size = of(name)
        part = next(part for part, words in PARTS.items() if any(word in name for word in words))
        size.parts[part] = size.parts.get(part, 0) + tensor.bytes
    tensors = manifest.parameters.tensors
    for linear in linears:
        # The head may be the embedding, whose tensors have that name.
        stored = [n for n in tensors if n.startswith((f"{linear.name}.", f"{linear.name}+"))]
        if stored:
            size = of(stored[0])
            size.weights += linear.spec.n * linear.spec.k * max(1, linear.spec.experts)
            size.coded += sum(tensors[n].bytes for n in stored if not n.endswith(".bias"))
    numbered = [size for key, size in found.items() if key.startswith("layer ")]
    others = [size for key, size in found.items() if not key.startswith("layer ")]
    return [
        *sorted(others, key=lambda size: -size.bytes),
        *sorted(numbered, key=lambda size: int(size.name.split()[1])),
    ]


@dataclass(frozen=True)
class Roof:
    """What a machine gives at most.

    Attributes
    ----------
    bandwidth : float
        Bytes a second that are read from memory.
    peak : float
        Multiplications and additions a second.
    products : str
        What is multiplied: "bytes" or "float32".
    """

    bandwidth: float
    peak: float
    products: str

    def seconds(self, moved: int, operations: int) -> float:
        """Return the time of a step at least."""
        return max(moved / self.bandwidth, operations / self.peak)

    @property
    def ridge(self) -> float:
        """Operations a byte from which on arithmetic is what bounds."""
        return self.peak / self.bandwidth


@dataclass(frozen=True)
class Floor:
    """What a decode step reads and computes at least, and what that allows.

    Attributes
    ----------
    sequences, context : int
        Sequences of the step, and cached tokens of each.
    bytes : int
        Weights once, keys and values of every cached token.
    operations : int
        Multiplications with additions of the linears, two each.
    seconds : float
        The longer of ``bytes`` at the bandwidth and ``operations`` at the peak.
    """

    sequences: int
    context: int
    bytes: int
    operations: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """At most, for all sequences together."""
        return self.sequences / self.seconds

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes


def floors(
    linears: list[ChosenKernel], weights: int, token: int, contexts: list[int], roof: Roof
) -> list[Floor]:
    """Return the floors of steps.

    Parameters
    ----------
    linears : list of ChosenKernel
        The model's linears.
    weights, token : int
        Bytes of the weights that a step reads, and of a token's keys and values.
    contexts : list of int
        Cached tokens.
    roof : Roof
        What the machine gives.
    """
    macs = sum(linear.spec.n * linear.spec.k for linear in linears)
    made = []
    for count in SEQUENCES:
        for context in contexts:
            moved = weights + count * context * token
            operations = 2 * count * macs
            seconds = roof.seconds(moved, operations)
            made.append(Floor(count, context, moved, operations, seconds))
    return made
