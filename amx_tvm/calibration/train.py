"""Training of what is stored: the scales and the roundings of all linears, against the float model.

The start is a rounded network (GPTQ's). Every weight becomes two trained tensors: a latent weight,
of which the stored code is the nearest, and the logarithm of each group's scales, of which the
stored byte is the nearest. Both roundings pass the gradient straight through (Bengio et al., arXiv
1308.3432; step sizes as in LSQ, arXiv 1902.08153). The loss is the Kullback-Leibler divergence of
the rounded network's next-token distribution from the float model's, over whole windows of text, so
no labels are learned (quantization-aware distillation, NVIDIA arXiv 2601.20088; scales end to end
as in FOCUS, arXiv 2608.01847). What comes out has the format's own bits.

Activations are rounded as the configuration says, by the twin in `fake`. All latent weights are in
memory, in float32 with two moments of Adam each (16 bytes a weight), and one layer's activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from amx_tvm.calibration.block import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    STAGES,
    Rope,
    layer_name,
    open_decoder,
    rms_norm,
    run,
    stages,
)
from amx_tvm.calibration.fake import (
    fake_round,
    log2_of,
    quotient,
    round_magnitude,
    round_scale,
    straight,
)
from amx_tvm.calibration.recipes import Train
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import CalibrationError
from amx_tvm.formats import Format, Quantized, e2m1
from amx_tvm.formats.scales import Minifloat
from amx_tvm.frontends import ModelSource
from amx_tvm.models import DecoderConfig
from relax_passes.activation import Scheme

Progress = Callable[[str, int, int, str], None]
VALIDATION = 8  # windows that are not trained on; they choose the state that is kept
CHECKS = 6  # times in a training that they are looked at
WARMUP = 0.05  # share of the steps over which the rates grow
INSIDE = 1e-3  # how far from its cell's edge a latent weight starts, in units of the scale


class TrainedWeight(nn.Module):
    """A linear's weight whose codes and scales are trained.

    Parameters
    ----------
    weight : float32 [N, K], the float weight in the basis of the start
    start : its rounded form; K must be whole groups
    """

    def __init__(self, weight: Tensor, start: Quantized) -> None:
        super().__init__()
        self.format, self.tensor_scale = start.format, start.tensor_scale
        self.kind = start.format.scale_tensors[0].type
        self.size = start.format.group_size
        self.row = 1.0 if start.tensor_scale is None else float(start.tensor_scale)
        names = [tensor.name for tensor in start.format.scale_tensors]
        scales = [torch.from_numpy(self.kind.decode(start.scales[n])) * self.row for n in names]
        self.logs = nn.Parameter(torch.stack([log2_of(scale) for scale in scales]))
        values = torch.from_numpy(start.format.dequantize(start))
        latent, unit = _inside_cells(self._grouped(weight), self._grouped(values), scales)
        # Trained in units of the group's scale, so that one rate fits all weights.
        self.register_buffer("latent", latent)
        self.register_buffer("unit", unit)
        self.moved = nn.Parameter(torch.zeros_like(latent))

    def _grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size))

    def scales(self) -> Tensor:
        """Values of the stored scales [1 or 2, N, G], the gradient passing the rounding."""
        exact = torch.exp2(self.logs)
        with torch.no_grad():
            stored = round_scale(exact / self.row, self.kind) * self.row
        return straight(stored, exact)

    def forward(self) -> Tensor:
        """The weight [N, K] as the network will have it."""
        weight, scales = self.latent + self.moved * self.unit, self.scales()[..., None]
        positive = weight > 0
        scale = torch.where(positive, scales[0], scales[-1])
        ratio = quotient(weight.abs(), scale).clamp(max=e2m1.LARGEST)
        value = straight(round_magnitude(ratio.detach()), ratio) * scale
        return torch.where(positive, value, -value).flatten(-2)

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """The stored form."""
        weight = (self.latent + self.moved * self.unit).cpu().numpy()
        exact = torch.exp2(self.logs) / self.row
        stored = round_scale(exact, self.kind).cpu().numpy()
        names = [tensor.name for tensor in self.format.scale_tensors]
        scales = {n: self.kind.encode(part) for n, part in zip(names, stored, strict=True)}
        row = self.tensor_scale
        if row is not None:
            row = np.broadcast_to(np.asarray(row, np.float32), (len(weight), 1))
        codes = self.format.encode(weight, scales, row).reshape(len(weight), -1)
        return Quantized(np.ascontiguousarray(codes), scales, self.format, self.tensor_scale)


def _inside_cells(weight: Tensor, start: Tensor, scales: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Latent weights: the float weight, moved into the cell that rounds to the start's code.

    All are [N, G, group]; scales [N, G]. Returns them and the scale of each weight's sign.
    """
    sign = torch.where(start != 0, start.sign(), torch.where(weight > 0, 1.0, -1.0))
    unit = torch.where(sign > 0, scales[0][..., None], scales[-1][..., None])
    code = quotient(start.abs(), unit)
    edges = torch.tensor([-math.inf, *e2m1.MIDPOINTS, math.inf])
    index = torch.bucketize(code.contiguous(), edges[1:-1], right=True)
    low, high = edges[index] + INSIDE, edges[index + 1] - INSIDE
    ratio = quotient(weight * sign, unit).maximum(low).minimum(high)
    return sign * ratio * unit, unit


@dataclass(frozen=True)
class Network:
    """What the float and the rounded network share: all but the layers' weights."""

    decoder: DecoderConfig
    embedding: Tensor
    norm: Tensor
    head: Tensor
    ropes: list[Rope]

    def logits(
        self,
        ids: Tensor,
        weights: Callable[[int], Mapping[str, Tensor]],
        fake: Callable[[int, str, Tensor], Tensor],
    ) -> Tensor:
        """Logits [windows, tokens, vocab] of ids int64 [windows, tokens].

        weights : a layer's parameters by their name within it
        fake : rounds the input of a layer's stage
        """

        def layer(number: int, x: Tensor) -> Tensor:
            steps = stages(
                x,
                weights(number),
                self.decoder,
                self.ropes[number],
                lambda stage, value: fake(number, stage, value),
            )
            return run(steps)

        x = self.embedding[ids] * self.decoder.embedding_scale
        for number in range(len(self.ropes)):
            if torch.is_grad_enabled():
                x = checkpoint(layer, number, x, use_reentrant=False)
            else:
                x = layer(number, x)
        return rms_norm(x, self.norm, self.decoder.norm_eps) @ self.head.T


class Training:
    """Trains a calibrated start.

    Parameters
    ----------
    source : the float model
    config : formats and activations of the result
    start : rounded weights by name, as `Calibration.quantized`
    targets : float32 arrays by name: the float weights in the start's basis, and norm weights and
        biases that the recipe's exact steps changed
    ids : int64 [windows, tokens]; the last `VALIDATION` windows are not trained on
    step : the recipe's settings
    device : a torch device
    """

    def __init__(
        self,
        source: ModelSource,
        config: QuantizationConfig,
        start: Mapping[str, Quantized],
        targets: Mapping[str, np.ndarray],
        ids: Tensor,
        step: Train,
        device: str | torch.device = "cpu",
    ) -> None:
        if len(ids) < 2 * VALIDATION:
            raise CalibrationError(
                f"training has {len(ids)} windows of text; it needs {2 * VALIDATION} at least, of "
                f"which {VALIDATION} choose the state that is kept. Give more text"
            )
        view, self.decoder = open_decoder(source)
        self.config, self.step, self.device = config, step, torch.device(device)
        self.ids, self.held = ids[:-VALIDATION], ids[-VALIDATION:]
        self.trained: dict[str, TrainedWeight] = {}

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

        exact: list[dict[str, Tensor]] = []
        self.fixed: list[dict[str, Tensor]] = []
        for layer in range(self.decoder.num_layers):
            prefix = layer_name(layer, "")
            names = [name for name in view.names() if name.startswith(prefix)]
            exact.append({name.removeprefix(prefix): put(view.load(name)) for name in names})
            self.fixed.append(dict(exact[-1]))
            for name in names:
                part = name.removeprefix(prefix)
                if name in start and trainable(start[name]) and name in targets:
                    weight = TrainedWeight(torch.from_numpy(targets[name]), start[name])
                    self.trained[name] = weight.to(self.device)
                elif name in start:
                    self.fixed[-1][part] = put(start[name].format.dequantize(start[name]))
                elif name in targets:
                    self.fixed[-1][part] = put(targets[name])
        if not self.trained:
            raise CalibrationError(
                "no linear of this start can be trained: formats of E2M1 elements with 8-bit float "
                "scales can, in rows of whole groups; choose a recipe without training"
            )
        layers = range(self.decoder.num_layers)
        ropes = [Rope(self.decoder, n, ids.shape[1], self.device) for n in layers]
        embedding, norm = put(view.load(EMBEDDING)), put(view.load(FINAL_NORM))
        head = embedding if self.decoder.tie_embeddings else put(view.load(HEAD))
        self.network = Network(self.decoder, embedding, norm, head, ropes)
        self.exact = exact
        self.rounding = [self._activations(layer) for layer in layers]

    def _activations(self, layer: int) -> dict[str, Format]:
        """Formats that inputs of a layer's linears are rounded to, by stage."""
        found = {}
        for stage, linears in STAGES.items():
            activation = self.config.linear(layer_name(layer, linears[0])).activation
            if activation.scheme is Scheme.FOUR_BIT:
                found[stage] = activation.fmt
        return found

    def _student(self, layer: int) -> dict[str, Tensor]:
        weights = dict(self.fixed[layer])
        prefix = layer_name(layer, "")
        for part in weights:
            if prefix + part in self.trained:
                weights[part] = self.trained[prefix + part]()
        return weights

    def _fake(self, layer: int, stage: str, value: Tensor) -> Tensor:
        fmt = self.rounding[layer].get(stage)
        return value if fmt is None else fake_round(value, fmt)

    def divergence(self, ids: Tensor) -> Tensor:
        """Mean divergence of the rounded network from the float one, in nats a token.

        ids : int64 [windows, tokens] on the device
        """
        with torch.no_grad():
            exact = self.network.logits(ids, lambda layer: self.exact[layer], _unchanged)
            reference = functional.log_softmax(exact, dim=-1)
        seen = functional.log_softmax(self.network.logits(ids, self._student, self._fake), dim=-1)
        loss = functional.kl_div(seen, reference, reduction="none", log_target=True)
        return loss.sum(-1).mean()

    @torch.no_grad()
    def validate(self) -> float:
        """Divergence on the windows that are not trained on."""
        parts = [float(self.divergence(ids[None].to(self.device))) for ids in self.held]
        return sum(parts) / len(parts)

    def run(self, progress: Progress | None = None) -> Iterator[tuple[str, Quantized]]:
        """Train, and yield each linear's name and stored form.

        A training that diverges, or that ends worse than it began, gives the best state that
        `validate` has seen: at worst the start.
        """
        step = self.step
        weights = self.trained.values()
        groups = [
            {"params": [w.moved for w in weights], "lr": step.rate},
            {"params": [w.logs for w in weights], "lr": step.scale_rate},
        ]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        total = max(1, len(self.ids) * step.epochs // step.batch)
        rates = [group["lr"] for group in groups]
        order = np.random.default_rng(0)
        best, kept = self.validate(), self._state()
        check = max(1, total // CHECKS)
        queue: list[int] = []
        for number in range(total):
            if progress is not None:
                progress("train", number, total, f"divergence {best:.4f}")
            for group, rate in zip(adam.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(number / total)
            if len(queue) < step.batch:
                queue += order.permutation(len(self.ids)).tolist()
            chosen, queue = queue[: step.batch], queue[step.batch :]
            for part in torch.tensor(chosen).split(step.at_once):
                loss = self.divergence(self.ids[part].to(self.device)) * (len(part) / step.batch)
                loss.backward()
            adam.step()
            adam.zero_grad()
            if (number + 1) % check == 0 or number + 1 == total:
                found = self.validate()
                if not math.isfinite(found):
                    break
                if found < best:
                    best, kept = found, self._state()
        self._restore(kept)
        if progress is not None:
            progress("train", total, total, f"divergence {best:.4f}")
        for name, weight in self.trained.items():
            yield name, weight.quantized()

    def _state(self) -> list[Tensor]:
        parts = [p for w in self.trained.values() for p in (w.moved, w.logs)]
        return [p.detach().to("cpu", copy=True) for p in parts]

    @torch.no_grad()
    def _restore(self, state: list[Tensor]) -> None:
        parts = [p for w in self.trained.values() for p in (w.moved, w.logs)]
        for parameter, value in zip(parts, state, strict=True):
            parameter.copy_(value)


def schedule(share: float) -> float:
    """Share of the rate at a share of the steps: up over `WARMUP`, then down as a cosine."""
    if share < WARMUP:
        return (share + 1e-3) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))


def trainable(start: Quantized) -> bool:
    """Whether a rounded weight has elements and scales that training knows."""
    kinds = {tensor.type for tensor in start.format.scale_tensors}
    whole = start.codes.shape[-1] % start.format.group_size == 0
    return start.format.rule is not None and whole and all(isinstance(k, Minifloat) for k in kinds)


def _unchanged(_layer: int, _stage: str, value: Tensor) -> Tensor:
    return value
