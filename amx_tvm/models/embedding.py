"""Models that make a vector of a text: a body, the mean of a span of its rows, dense layers.

Texts lie one behind the other, [tokens, features], and attend each inside itself. Which span is
averaged says the pooling: all rows of a text, its first or its last. Cutting and normalizing the
vectors is the runtime's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from amx_tvm.embedding import Dense
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.step import PackedStep
from relax_passes.ops import mean_rows

FUNCTION = "embed"


class EmbeddingModel(nn.Module):
    """A body with pooling and dense layers.

    Parameters
    ----------
    config : DecoderConfig
        The body's shape.
    body : nn.Module
        With ``run(input_ids, step)`` and ``norm``.
    dense : sequence of Dense
        What stands behind the pooling.
    """

    def __init__(self, config: DecoderConfig, body: nn.Module, dense: Sequence[Dense]) -> None:
        self.config, self.layers = config, tuple(dense)
        self.model = body
        self.dense = nn.ModuleList([nn.Linear(d.inputs, d.outputs, bias=d.bias) for d in dense])

    def embed(self, input_ids: Tensor, positions: Tensor, bounds: Tensor, spans: Tensor) -> Tensor:
        """Make the vectors of several texts.

        Parameters
        ----------
        input_ids, positions : Tensor
            int32 [rows]: the tokens of all texts, and their positions in them.
        bounds : Tensor
            int32 [texts + 1]: the first row of each text, and the end.
        spans : Tensor
            int32 [vectors, 2]: first row and one past the last that a vector is the mean of.

        Returns
        -------
        Tensor
            float32 [vectors, dimension], not normalized.
        """
        step = PackedStep(positions, bounds, self.config.causal)
        hidden = self.model.norm(self.model.run(input_ids, step))
        call = mean_rows(hidden._expr, spans._expr)
        pooled = Tensor(_expr=relax.BlockBuilder.current().emit(call))
        for layer, said in zip(self.dense, self.layers, strict=True):
            pooled = layer(pooled)
            pooled = op.tanh(pooled) if said.activation == "tanh" else pooled
        return pooled

    def export_spec(self) -> nn.spec.ModuleSpec:
        """Return the input shapes and types of the exported function."""
        function: dict[str, Any] = {
            "input_ids": nn.spec.Tensor(["rows"], "int32"),
            "positions": nn.spec.Tensor(["rows"], "int32"),
            "bounds": nn.spec.Tensor(["ends"], "int32"),
            "spans": nn.spec.Tensor(["vectors", 2], "int32"),
            "$": {"param_mode": "plain", "effect_mode": "none"},
        }
        return nn.spec.ModuleSpec.from_raw({FUNCTION: function}, self)
