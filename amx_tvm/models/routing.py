"""DeepSeek's choice of experts, which GLM-4.5 and others have too: groups, a bias, shared experts.

A token's experts are the best by score (sigmoid or softmax of the router's logits) plus a learned
bias, from the best groups of experts; their shares are the scores themselves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from amx_tvm.errors import ModelError
from amx_tvm.models.config import DecoderConfig, Routing
from amx_tvm.models.config_reader import ConfigReader
from amx_tvm.models.decoder import GatedMLP
from amx_tvm.models.moe import MixtureLayer, MixtureLM, MixtureMLP, MixtureModel, best, read_experts

LOWEST = -3.4e38
DENSE, SPARSE = "dense", "sparse"  # what `mlp_layer_types` calls a layer's MLP


class RoutedMLP(MixtureMLP):
    """Experts that are chosen by :class:`Routing`."""

    def __init__(self, config: DecoderConfig, routing: Routing) -> None:
        super().__init__(config)
        self.routing = routing
        if routing.bias:
            self.choice_bias = nn.Parameter((config.experts,), "float32")

    def to(self, dtype: str | None = None) -> None:
        """Keep the bias's type, which decides between near ties."""
        for part in (self.router, self.experts, getattr(self, "shared_experts", None)):
            if part is not None:
                part.to(dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map [tokens, hidden] to the experts of each token, best first, and their shares."""
        routing, logits = self.routing, self.router(x)
        scores = op.sigmoid(logits) if routing.score == "sigmoid" else op.softmax(logits, axis=-1)
        choice = scores + self.choice_bias if routing.bias else scores
        if routing.groups > 1:
            choice = self._of_best_groups(choice)
        ids, _ = best(choice, self.config.experts_per_token)
        shares = _at(scores, ids)
        if routing.normed:
            shares = shares / (op.sum(shares, axis=-1, keepdims=True) + 1e-20)
        return ids, shares if routing.scale == 1.0 else shares * routing.scale

    def _of_best_groups(self, choice: Tensor) -> Tensor:
        """Put experts of all other groups out of reach; [tokens, experts]."""
        routing, tokens, experts = self.routing, choice.shape[0], self.config.experts
        groups, size = routing.groups, self.config.experts // routing.groups
        by_group = op.reshape(choice, (tokens * groups, size))
        ids, _ = best(by_group, routing.group_best)
        sums = op.reshape(op.sum(_at(by_group, ids), axis=-1), (tokens, groups))
        taken, _ = best(sums, routing.chosen_groups)
        numbers = relax.const(np.arange(groups, dtype=np.int32).reshape(1, 1, groups))
        builder = relax.BlockBuilder.current()
        column = op.reshape(taken, (tokens, routing.chosen_groups, 1))._expr
        hits = builder.emit(relax.op.equal(column, numbers))
        mask = builder.emit(relax.op.max(relax.op.astype(hits, "int32"), axis=1))
        allowed = builder.emit(relax.op.equal(mask, relax.const(1, "int32")))
        wide = builder.emit(relax.op.reshape(allowed, [tokens, groups, 1]))
        values = op.reshape(choice, (tokens, groups, size))._expr
        kept = relax.op.where(wide, values, relax.const(LOWEST, "float32"))
        return op.reshape(Tensor(_expr=builder.emit(kept)), (tokens, experts))


def _at(values: Tensor, ids: Tensor) -> Tensor:
    """Return the values of each row's columns."""
    picked = relax.op.gather_elements(values._expr, ids._expr, axis=1)
    return Tensor(_expr=relax.BlockBuilder.current().emit(picked))


class RoutedLayer(MixtureLayer):
    """A decoder layer with such experts, except where the configuration says dense."""

    def make_mlp(self, config: DecoderConfig, layer: int) -> nn.Module:
        """Build the MLP."""
        if layer in config.dense_layers or config.routing is None:
            return GatedMLP(config)
        return RoutedMLP(config, config.routing)


class RoutedModel(MixtureModel):
    """A decoder of such layers."""

    def make_layer(self, config: DecoderConfig, index: int) -> nn.Module:
        """Build one layer."""
        return RoutedLayer(config, index)


class RoutedLM(MixtureLM):
    """A causal language model with such experts."""

    def make_model(self, config: DecoderConfig) -> nn.Module:
        """Build the decoder."""
        return RoutedModel(config)


def read_routing(values: dict[str, Any], score: str, **differences: Any) -> dict[str, Any]:
    """Return the DecoderConfig's fields about experts of a DeepSeek-like configuration.

    Parameters
    ----------
    values : dict
        The configuration.
    score : str
        As in :class:`Routing`; with "sigmoid" the choice has a bias.
    differences : optional
        Fields of the Routing that the family sets itself.
    """
    read = ConfigReader(values)
    found = read_experts(read, "moe_intermediate_size", ("n_routed_experts", "num_local_experts"))
    groups, chosen = int(read.get("n_group", 1)), int(read.get("topk_group", 1))
    size, left = divmod(found["experts"], groups) if groups > 0 else (0, 1)
    if left or not 0 < chosen <= groups or size * chosen < found["experts_per_token"]:
        raise ModelError(
            f"the configuration fields n_group {groups} and topk_group {chosen} do not fit "
            f"{found['experts']} experts of which a token takes {found['experts_per_token']}"
        )
    routing = Routing(
        score,
        bias=score == "sigmoid",
        groups=groups,
        chosen_groups=chosen,
        normed=bool(read.get("norm_topk_prob", True)),
        scale=float(read.get("routed_scaling_factor", 1.0)),
    )
    layers = read.require("num_hidden_layers")
    first = int(read.get("first_k_dense_replace", 0))
    kinds = list(
        read.get("mlp_layer_types", [DENSE if i < first else SPARSE for i in range(layers)])
    )
    if len(kinds) != layers or set(kinds) - {DENSE, SPARSE}:
        raise ModelError(
            f"the configuration field 'mlp_layer_types' is {kinds}; expected {DENSE!r} or "
            f"{SPARSE!r} for each of {layers} layers"
        )
    shared = int(read.get("n_shared_experts", 0)) * found["expert_size"]
    return found | {
        "routing": replace(routing, **differences),
        "shared_size": shared,
        "dense_layers": tuple(i for i, kind in enumerate(kinds) if kind == DENSE),
    }
