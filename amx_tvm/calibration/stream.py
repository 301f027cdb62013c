"""Calibration one layer at a time: the residual streams go through, everything else is forgotten.

Two streams of the calibration tokens run through the model side by side, layer by layer:

    exact   the float network
    seen    the network as it will run: layers so far quantized, activations faked as configured

For each layer: load its weights, run `exact` and keep the inputs of its four stages, apply the
exact transforms, then take `seen` to each stage, gather the statistics, round that stage's linears
and let `seen` continue through the rounded weights. Memory is one layer, its four inputs for all
calibration tokens, and the two streams [tokens, hidden]. That is 11 GiB for a layer of an 8B model
with 12 k tokens (docs/accuracy.md), much of it for the float64 inverse of down_proj's moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amx_tvm import formats
from amx_tvm.calibration import transforms
from amx_tvm.calibration.attention import attention_of
from amx_tvm.calibration.block import (
    EMBEDDING,
    STAGES,
    Fake,
    Rope,
    layer_name,
    open_decoder,
    run,
    stages,
)
from amx_tvm.calibration.fake import fake_round
from amx_tvm.calibration.gptq import Rounded, Statistics, corrected, gptq, plain
from amx_tvm.calibration.grids import grid_of
from amx_tvm.calibration.recipes import Gptq, Plain, Recipe, RotateValues, Smooth
from amx_tvm.config import QuantizationConfig
from amx_tvm.formats import Format, Quantized
from amx_tvm.frontends import ModelSource
from relax_passes.activation import Scheme

BATCH = 4  # windows that go through a layer together
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Calibrated:
    """One calibrated parameter: a rounded weight, or a float32 array that replaces the model's.

    error : for rounded weights, the relative squared error of the linear's output on the
        calibration text (see `Rounded`); 0 for float replacements
    target : for rounded weights, the float32 weight [N, K] that was rounded, exact steps applied
    """

    name: str
    value: Quantized | np.ndarray
    error: float = 0.0
    target: Tensor | None = None


def fake_quantizer(config: QuantizationConfig, layer: int) -> Fake:
    """The rounding that a configuration does to the inputs of a layer's linears.

    int8 in groups of 32 and float16 change less than calibration can see and count as exact.
    """
    chosen: dict[str, Format] = {}
    for stage, linears in STAGES.items():
        activation = config.linear(layer_name(layer, linears[0])).activation
        if activation.scheme is Scheme.FOUR_BIT:
            chosen[stage] = activation.fmt

    def fake(stage: str, x: Tensor) -> Tensor:
        if stage not in chosen:
            return x
        return fake_round(x, chosen[stage])

    return fake


def attention_format(config: QuantizationConfig) -> str:
    """Format of attention's operands, "" where they are not rounded."""
    return config.format if config.attention else ""


class Stream:
    """Both residual streams of a model over calibration windows.

    Parameters
    ----------
    source : the float model
    config : which linear gets which format and activation
    ids : int64 [windows, tokens] calibration token ids
    recipe : what to do
    device : a torch device for all of it
    """

    def __init__(
        self,
        source: ModelSource,
        config: QuantizationConfig,
        ids: Tensor,
        recipe: Recipe,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.config, self.recipe, self.tokens = config, recipe, ids.shape[1]
        self.source, self.decoder = open_decoder(source)
        embedded = torch.from_numpy(self.source.load(EMBEDDING))[ids]
        embedded *= self.decoder.embedding_scale
        self.exact = list(embedded.to(self.device).split(BATCH))
        self.seen = [part.clone() for part in self.exact]

    @torch.no_grad()
    def run(self, progress: Progress | None = None) -> Iterator[Calibrated]:
        """Calibrate layer after layer; yields whatever differs from the source."""
        for layer in range(self.decoder.num_layers):
            if progress is not None:
                progress("calibrate", layer, self.decoder.num_layers, f"layer {layer}")
            yield from self._layer(layer)
        if progress is not None:
            progress("calibrate", self.decoder.num_layers, self.decoder.num_layers, "")

    def load_layer(self, layer: int) -> dict[str, Tensor]:
        """Load a layer's parameters by their name within the layer."""
        prefix = layer_name(layer, "")
        names = [name for name in self.source.names() if name.startswith(prefix)]
        return {n.removeprefix(prefix): self._put(self.source.load(n)) for n in names}

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _layer(self, layer: int) -> Iterator[Calibrated]:
        weights = self.load_layer(layer)
        original = dict(weights)
        stored = self._stored(layer, weights)
        reference = self.run_exact(layer, weights)
        self._transform(weights, stored, reference)
        rope = Rope(self.decoder, layer, self.tokens, self.device)
        fake = fake_quantizer(self.config, layer)
        attend = attention_of(attention_format(self.config))
        generators = [stages(x, weights, self.decoder, rope, fake, attend) for x in self.seen]
        rounded: dict[str, Calibrated] = {}
        step = self.recipe.find(Gptq)
        mixed = step is not None and step.correction != 0
        for stage, linears in STAGES.items():
            statistics = Statistics.empty(
                weights[f"{linears[0]}.weight"].shape[1], mixed, self.device
            )
            for generator, exact in zip(generators, reference.pop(stage), strict=True):
                statistics.add(next(generator)[1], exact)
            for linear in linears:
                part = f"{linear}.weight"
                if part in stored:
                    continue
                target = weights[part]
                result = self._round(layer_name(layer, linear), target, statistics)
                if result is not None:
                    weights[part] = result.values
                    name = layer_name(layer, part)
                    rounded[part] = Calibrated(name, result.quantized, result.error, target)
        self.seen = [run(generator) for generator in generators]
        for part, value in weights.items():
            if part in rounded:
                yield rounded[part]
            elif value is not original[part] and part not in stored:
                yield Calibrated(layer_name(layer, part), value.cpu().numpy())

    def _stored(self, layer: int, weights: dict[str, Tensor]) -> set[str]:
        """Weights whose file already holds the format asked for: they pass through untouched."""
        stored = set()
        for part in weights:
            linear = layer_name(layer, part).removesuffix(".weight")
            wanted = self.config.linear(linear).format
            raw = self.source.load_raw(f"{linear}.weight") if part.endswith(".weight") else None
            if raw is not None and raw.format.name == wanted:
                weights[part] = self._put(raw.format.dequantize(raw))
                stored.add(part)
        return stored

    def run_exact(self, layer: int, weights: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """Advance the exact stream by a layer; returns every stage's inputs, batch by batch."""
        inputs: dict[str, list[Tensor]] = {stage: [] for stage in STAGES}
        rope = Rope(self.decoder, layer, self.tokens, self.device)
        for index, x in enumerate(self.exact):
            generator = stages(x, weights, self.decoder, rope, lambda _stage, value: value)
            for _ in STAGES:
                stage, value = next(generator)
                inputs[stage].append(value)
            self.exact[index] = run(generator)
        return inputs

    def _transform(
        self, weights: dict[str, Tensor], stored: set[str], reference: dict[str, list[Tensor]]
    ) -> None:
        """Apply the exact transforms; the reference inputs follow into the changed basis."""
        size = self.decoder.head_dim
        touched = {"self_attn.v_proj.weight", "self_attn.o_proj.weight"}
        if self.recipe.find(RotateValues) and not touched & stored:
            transforms.rotate_values(weights, size)
            rotation = transforms.hadamard(size).to(self.device)
            for x in reference["attention_output"]:
                x.copy_((x.view(*x.shape[:-1], -1, size) @ rotation).view_as(x))
        step = self.recipe.find(Smooth)
        powers = {} if step is None else dict(attention_input=step.norm, mlp_input=step.norm)
        if step is not None:
            powers["mlp_hidden"] = step.hidden
        for stage, power in powers.items():
            touched = {f"{part}.weight" for part in STAGES[stage]} | {
                transforms.producer_of(stage, self.decoder)
            }
            if power == 0 or touched & stored:
                continue
            factors = transforms.smoothing_factors(torch.cat(reference[stage]), power)
            transforms.smooth(weights, stage, factors, self.decoder)
            for x in reference[stage]:
                x.div_(factors)

    def _round(self, linear: str, weight: Tensor, statistics: Statistics) -> Rounded | None:
        """Round one weight as the recipe says; None where its policy leaves it in float32."""
        name = self.config.linear(linear).format
        if name == "none":
            return None
        if formats.get(name).code_bits != 4:
            quantized = formats.get(name).quantize(weight.cpu().numpy(), name=linear)
            return Rounded(self._put(quantized.format.dequantize(quantized)), quantized)
        grid, hessian = grid_of(name), statistics.hessian
        step = self.recipe.find(Gptq)
        if step is None:
            return plain(weight, grid, hessian, self.recipe.find(Plain).search)
        target = corrected(weight, statistics, step.damping, step.correction)
        return gptq(
            target,
            grid,
            hessian,
            damping=step.damping,
            ordered=step.ordered,
            search=step.search,
            keep=step.keep,
        )
