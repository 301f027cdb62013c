"""Training of what is stored: the scales and the roundings of all linears, against the float model.

The start is a rounded network. Every weight becomes two trained tensors: a latent weight,
of which the stored code is the nearest, and the logarithm of each group's scales, of which the
stored byte is the nearest. Both roundings pass the gradient straight through (Bengio et al., arXiv
1308.3432; step sizes as in LSQ, arXiv 1902.08153). The loss is the Kullback-Leibler divergence of
the rounded network's next-token distribution from the float model's, over whole windows of text, so
no labels are learned (quantization-aware distillation, NVIDIA arXiv 2601.20088; scales end to end
as in FOCUS, arXiv 2608.01847). What comes out has the format's own bits.

Activations are rounded as the configuration says, by the twin in `fake`. In memory are the float
model, all latent weights in float32 with their gradients and two moments of Adam (24 bytes a weight
with the state that is kept), and the activations of one pass, of one layer with `recompute`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from amx_tvm import formats
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
from amx_tvm.calibration.fake import fake_round
from amx_tvm.calibration.recipes import Train
from amx_tvm.calibration.trained import table_of, trainable
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import CalibrationError
from amx_tvm.formats import Format, Quantized
from amx_tvm.frontends import ModelSource
from amx_tvm.models import DecoderConfig
from relax_passes.activation import Scheme

Progress = Callable[[str, int, int, str], None]
VALIDATION = 8  # windows that are not trained on; they choose the state that is kept
CHECKS = 6  # times in a training that they are looked at
WARMUP = 0.05  # share of the steps over which the rates grow
DIVERGED = 2.0  # times the start's divergence, from which on a training is lost


@dataclass(frozen=True)
class Network:
    """What the float and the rounded network share: all but the layers' weights."""

    decoder: DecoderConfig
    embedding: Tensor
    norm: Tensor
    head: Tensor
    ropes: list[Rope]
    recompute: bool

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
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, number, x, use_reentrant=False)
            else:
                x = layer(number, x)
        return rms_norm(x, self.norm, self.decoder.stream_eps) @ self.head.T


class Training:
    """Trains a calibrated start.

    Parameters
    ----------
    source : the float model
    config : formats and activations of the result
    start : rounded weights by name, as `Calibration.quantized`
    targets : float32 weights by name, those of the start before they were rounded
    floats : float32 arrays by name that the recipe's exact steps changed, as `Calibration.floats`
    ids : int64 [windows, tokens]; `VALIDATION` of them are not trained on
    step : the recipe's settings
    device : a torch device

    Attributes
    ----------
    start, best : divergence of the start and of the best state, in nats a token; set by `run`
    diverged : at which step a training was lost and how far off it was; "" where it was not
    """

    start: float
    best: float

    def __init__(
        self,
        source: ModelSource,
        config: QuantizationConfig,
        start: Mapping[str, Quantized],
        targets: Mapping[str, np.ndarray],
        floats: Mapping[str, np.ndarray],
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
        self.diverged = ""
        mixed = ids[np.random.default_rng(0).permutation(len(ids))]
        self.ids, self.held = mixed[VALIDATION:], mixed[:VALIDATION]
        found: dict[str, dict[str, tuple[np.ndarray, Quantized]]] = {}

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
                    pair = targets[name], start[name]
                    found.setdefault(start[name].format.name, {})[name] = pair
                elif name in start:
                    self.fixed[-1][part] = put(start[name].format.dequantize(start[name]))
                elif name in floats:
                    self.fixed[-1][part] = put(floats[name])
        if not found:
            raise CalibrationError(
                "no linear of this start can be trained: int4 and formats of E2M1 elements with "
                "8-bit float scales can, in rows of whole groups; choose a recipe without training"
            )
        tables = [table_of(formats.get(name), weights) for name, weights in found.items()]
        self.tables = [table.to(self.device) for table in tables]
        layers = range(self.decoder.num_layers)
        ropes = [Rope(self.decoder, n, ids.shape[1], self.device) for n in layers]
        embedding, norm = put(view.load(EMBEDDING)), put(view.load(FINAL_NORM))
        head = embedding if self.decoder.tie_embeddings else put(view.load(HEAD))
        self.network = Network(self.decoder, embedding, norm, head, ropes, step.recompute)
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

    def student(self) -> Callable[[int], dict[str, Tensor]]:
        """Weights of the rounded network's layers, all rounded once."""
        rounded = {name: value for table in self.tables for name, value in table().items()}

        def layer(number: int) -> dict[str, Tensor]:
            prefix = layer_name(number, "")
            return {
                part: rounded.get(prefix + part, value)
                for part, value in self.fixed[number].items()
            }

        return layer

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
        seen = functional.log_softmax(self.network.logits(ids, self.student(), self._fake), dim=-1)
        loss = functional.kl_div(seen, reference, reduction="none", log_target=True)
        return loss.sum(-1).mean()

    @torch.no_grad()
    def validate(self) -> float:
        """Divergence on the windows that are not trained on."""
        parts = self.held.split(self.step.at_once)
        sums = [float(self.divergence(ids.to(self.device))) * len(ids) for ids in parts]
        return sum(sums) / len(self.held)

    def run(self, progress: Progress | None = None) -> Iterator[tuple[str, Quantized]]:
        """Train, and yield each linear's name and stored form.

        What is yielded is the best state that `validate` has seen, at worst the start. A training
        that diverges ends there and then, and `diverged` says where.
        """
        with _products_of_ten_bits(self.device):
            self._train(progress)
        for table in self.tables:
            yield from table.quantized()

    def _train(self, progress: Progress | None) -> None:
        step = self.step
        rates = (step.rate, step.scale_rate)
        groups: list[dict[str, Any]] = [
            {"params": [table.moved for table in self.tables]},
            {"params": [table.logs for table in self.tables]},
        ]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=self.device.type == "cuda")
        total = max(1, len(self.ids) * step.epochs // step.batch)
        order = np.random.default_rng(0)
        self.start = self.best = self.validate()
        kept = self._state()
        check = max(1, total // CHECKS)
        queue: list[int] = []
        backward = self._backward()
        for number in range(total):
            if progress is not None:
                progress("train", number, total, f"divergence {self.best:.4f}")
            for group, rate in zip(adam.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(number / total)
            while len(queue) < step.batch:
                queue += order.permutation(len(self.ids)).tolist()
            chosen, queue = queue[: step.batch], queue[step.batch :]
            adam.zero_grad(set_to_none=False)
            for part in torch.tensor(chosen).split(step.at_once):
                backward(self.ids[part])
            adam.step()
            if (number + 1) % check == 0 or number + 1 == total:
                found = self.validate()
                if not found <= DIVERGED * self.start:  # not a number is neither
                    self.diverged = f"at step {number + 1} of {total}, to {found:.4g} nats a token"
                    break
                if found < self.best:
                    self.best, kept = found, self._state()
        self._restore(kept)
        if progress is not None:
            progress("train", total, total, f"divergence {self.best:.4f}")

    def _backward(self) -> Callable[[Tensor], None]:
        """What adds the gradients of some windows; on a GPU one CUDA graph of all its kernels.

        A pass is tens of thousands of small kernels: launched one by one they take ten times as
        long as they run.
        """
        share = self.step.at_once / self.step.batch
        for parameter in self._parameters():
            parameter.grad = torch.zeros_like(parameter)

        def plain(ids: Tensor) -> None:
            (self.divergence(ids.to(self.device)) * share).backward()

        if self.device.type != "cuda":
            return plain
        held = self.ids[: self.step.at_once].to(self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                plain(held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plain(held)

        def replay(ids: Tensor) -> None:
            held.copy_(ids)
            graph.replay()

        return replay

    def _parameters(self) -> list[nn.Parameter]:
        return [p for table in self.tables for p in (table.moved, table.logs)]

    def _state(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._parameters()]

    @torch.no_grad()
    def _restore(self, state: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters(), state, strict=True):
            parameter.copy_(value)


@contextmanager
def _products_of_ten_bits(device: torch.device) -> Iterator[None]:
    """On GPUs let products round their float32 inputs to 10 bits (TF32): errors average out."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def schedule(share: float) -> float:
    """Share of the rate at a share of the steps: up over `WARMUP`, then down as a cosine."""
    if share < WARMUP:
        return (share + 1e-3) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))


def _unchanged(_layer: int, _stage: str, value: Tensor) -> Tensor:
    return value
