"""Mixtures of experts: router, grouped products of the chosen experts, weighted sum.

The weights of all experts of a layer are one parameter, [experts * N, K], made of the checkpoint's
weights one expert at a time (:func:`sources_of`); rows of activations are sorted by expert for the
products. The router stays in float32.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from amx_tvm.errors import ModelError
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.decoder import ACTIVATIONS, CausalLM, DecoderLayer, DecoderModel, GatedMLP
from relax_passes.ops import expert_combine, expert_group, expert_matmul, expert_route

TILE = 16  # rows of a tile of the packed layouts, which experts do not share
_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)\.(weight|bias)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def sources_of(name: str, config: DecoderConfig) -> tuple[str, ...]:
    """Return the weights that a stacked parameter is made of, in order; () for any other.

    "X.experts.gate_up_proj.weight" is, for each expert e, "X.experts.e.gate_proj.weight" and
    "X.experts.e.up_proj.weight".
    """
    match = _STACKED.fullmatch(name)
    if match is None or not config.experts:
        return ()
    stem, part, kind = match.groups()
    return tuple(
        f"{stem}.{expert}.{piece}.{kind}"
        for expert in range(config.experts)
        for piece in _PARTS[part]
    )


def unstacked(
    shapes: dict[str, tuple[int, ...]], config: DecoderConfig
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, ...]]]:
    """Return the shapes of the weights to read, and the sources of stacked parameters."""
    single, stacks = {}, {}
    for name, shape in shapes.items():
        sources = sources_of(name, config)
        if sources:
            stacks[name] = sources
        for source in sources or (name,):
            single[source] = (shape[0] // len(sources or (name,)), *shape[1:])
    return single, stacks


class ExpertLinear(nn.Module):
    """One linear a row, by the expert that the row is sorted under."""

    def __init__(self, config: DecoderConfig, n: int, k: int, bias: bool) -> None:
        if n % TILE:
            raise ModelError(
                f"experts with {n} output features are not supported: expected a multiple of "
                f"{TILE}; see hidden_size and the experts' intermediate size in config.json"
            )
        self.experts = config.experts
        self.weight = nn.Parameter((config.experts * n, k))
        self.bias = nn.Parameter((config.experts * n,)) if bias else None

    def forward(self, x: Tensor, bounds: Tensor) -> Tensor:
        """Map [slots, K] to [slots, N]."""
        bias = self.bias._expr if self.bias is not None else None
        call = expert_matmul(x._expr, self.weight._expr, bounds._expr, bias, self.experts)
        return Tensor(_expr=relax.BlockBuilder.current().emit(call))


class Experts(nn.Module):
    """down(act(gate(x)) * up(x)) of the experts that the rows are sorted by."""

    def __init__(self, config: DecoderConfig) -> None:
        hidden, inner = config.hidden_size, config.expert_size
        self.activation = ACTIVATIONS[config.activation]
        self.gate_up_proj = ExpertLinear(config, 2 * inner, hidden, config.mlp_bias)
        self.down_proj = ExpertLinear(config, hidden, inner, config.mlp_bias)

    def gated(self, x: Tensor) -> Tensor:
        """Return what the down projection reads, of gates and ups side by side."""
        gate, up = op.split(x, 2, axis=-1)
        return self.activation(gate) * up

    def forward(self, x: Tensor, bounds: Tensor) -> Tensor:
        """Map [slots, hidden] to [slots, hidden]."""
        return self.down_proj(self.gated(self.gate_up_proj(x, bounds)), bounds)


class Router(nn.Linear):
    """Scores of the experts, in float32 whatever the model computes in."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(
            config.hidden_size, config.experts, bias=config.router_bias, dtype="float32"
        )

    def to(self, dtype: str | None = None) -> None:
        """Keep the weights' type."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [tokens, hidden] to float32 [tokens, experts]."""
        return super().forward(x if x.dtype == "float32" else x.astype("float32"))


class MixtureMLP(nn.Module):
    """The MLP of a layer with experts."""

    def __init__(self, config: DecoderConfig, experts: nn.Module | None = None) -> None:
        self.config = config
        self.router = Router(config)
        self.experts = experts or Experts(config)
        if config.shared_size:
            self.shared_experts = GatedMLP(replace(config, intermediate_size=config.shared_size))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map [tokens, hidden] to the experts of each token, best first, and their shares."""
        config = self.config
        return best(self.router(x), config.experts_per_token, config.shares_of_all)

    def rows(self, x: Tensor) -> Tensor:
        """Return what the experts read of what the router reads, [tokens, hidden]: the same."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Map [tokens, hidden] to [tokens, hidden]."""
        config, tokens = self.config, x.shape[0]
        experts, chosen = config.experts, config.experts_per_token
        ids, shares = self.route(x)
        source, place, bounds = _emit(expert_group(ids._expr, experts))
        sorted_rows = op.take(self.rows(x), op.reshape(source, (tokens * chosen,)), axis=0)
        products = self.experts(sorted_rows, bounds)
        combined = expert_combine(products._expr, shares._expr, place._expr)
        routed = Tensor(_expr=relax.BlockBuilder.current().emit(combined))
        return routed + self.shared_experts(x) if config.shared_size else routed


def best(scores: Tensor, chosen: int, shares_of_all: bool = False) -> tuple[Tensor, Tensor]:
    """Return the columns of the highest scores, best first, and their softmax, [rows, chosen]."""
    ids, shares = _emit(expert_route(scores._expr, chosen, shares_of_all))
    return ids, shares


def _emit(call: relax.Call) -> tuple[Tensor, ...]:
    """Bind an operator with several results."""
    builder = relax.BlockBuilder.current()
    made = builder.emit(call)
    items = (relax.TupleGetItem(made, i) for i in range(len(made.ty.fields)))
    return tuple(Tensor(_expr=builder.emit(item)) for item in items)


class MixtureLayer(DecoderLayer):
    """A decoder layer whose MLP has experts, except where the configuration says dense."""

    def make_mlp(self, config: DecoderConfig, layer: int) -> nn.Module:
        """Build the MLP."""
        return GatedMLP(config) if layer in config.dense_layers else MixtureMLP(config)


class MixtureModel(DecoderModel):
    """A decoder of such layers."""

    def make_layer(self, config: DecoderConfig, index: int) -> nn.Module:
        """Build one layer."""
        return MixtureLayer(config, index)


class MixtureLM(CausalLM):
    """A causal language model with experts."""

    def make_model(self, config: DecoderConfig) -> nn.Module:
        """Build the decoder."""
        return MixtureModel(config)


def read_experts(
    read: Any, size: str, names: tuple[str, ...], taken: str = "num_experts_per_tok"
) -> dict[str, Any]:
    """Return the DecoderConfig's fields about experts.

    Parameters
    ----------
    read : ConfigReader
        The configuration.
    size : str
        Its field of the experts' intermediate size.
    names : tuple of str
        Its field of the number of experts, as versions of transformers have called it.
    taken : str
        Its field of how many a token takes.
    """
    known = [name for name in names if read.get(name, None) is not None]
    experts = read.require(known[0] if known else names[0])
    chosen = read.require(taken)
    if not 0 < chosen <= experts:
        raise ModelError(
            f"the configuration field {taken!r} is {chosen}; expected 1 to the "
            f"number of experts, {experts}"
        )
    return {"experts": experts, "experts_per_token": chosen, "expert_size": read.require(size)}
