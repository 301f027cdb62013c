"""The shape of a decoder-only transformer, read from a Hugging Face ``config.json`` dictionary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from amx_tvm.errors import ModelError


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that the shared decoder needs; a family fills in what it does differently.

    Sizes are counts of features; ``context_length`` and positions are in tokens.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def attention_scale(self) -> float:
        """Factor on q k^T."""
        return self.head_dim**-0.5


class ConfigReader:
    """Reads fields of a config dictionary with errors that name the field and the model type."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.kind = values.get("model_type") or (values.get("architectures") or ["?"])[0]

    def require(self, name: str, kind: type = int) -> Any:
        """Return a field that must be there.

        Raises
        ------
        ModelError
            When the field is missing or not a number of the kind asked for.
        """
        value = self.values.get(name)
        if value is None:
            raise ModelError(
                f"the configuration of this {self.kind} model has no field {name!r}; "
                f"expected a {kind.__name__} in config.json"
            )
        try:
            return kind(value)
        except (TypeError, ValueError):
            raise ModelError(
                f"the configuration field {name!r} is {value!r}; expected a {kind.__name__}"
            ) from None

    def get(self, name: str, default: Any) -> Any:
        """Return a field or its default where it is missing or null."""
        value = self.values.get(name)
        return default if value is None else value

    def rope(self) -> tuple[float, dict[str, Any]]:
        """Return rope_theta and the scaling dictionary (empty when plain).

        Newer configurations hold both in ``rope_parameters``, older ones side by side.
        """
        parameters = dict(self.values.get("rope_parameters") or {})
        scaling = dict(self.values.get("rope_scaling") or parameters)
        theta = float(self.get("rope_theta", parameters.get("rope_theta", 10000.0)))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return theta, {}
        if kind not in ("llama3", "linear", "yarn", "longrope"):
            raise ModelError(
                f"RoPE scaling {kind!r} is not supported; supported are llama3, linear, yarn and "
                "longrope"
            )
        scaling["rope_type"] = kind
        return theta, scaling
