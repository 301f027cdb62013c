"""Reads the shape of a decoder from a Hugging Face ``config.json`` dictionary."""

from __future__ import annotations

from typing import Any

from amx_tvm.errors import ModelError
from amx_tvm.models.config import FULL, SLIDING, STORED_BIASES, DecoderConfig

ROPE_SCALINGS = ("llama3", "linear", "yarn", "longrope")
MOST_HEAD_DIM, MOST_CHANNELS = 4096, 1 << 20
PATTERN = "sliding_window_pattern"


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

    def inside(self, name: str, defaults: dict[str, Any], note: str = "") -> ConfigReader:
        """Return a reader of a field that is an object, completed by defaults.

        Raises
        ------
        ModelError
            When there is no such object.
        """
        values = self.values.get(name)
        if not isinstance(values, dict):
            raise ModelError(
                f"the configuration of this {self.kind} model has no object {name!r}; expected one"
                + note
            )
        given = {key: value for key, value in values.items() if value is not None}
        return ConfigReader({**defaults, "model_type": self.kind, **given})

    def only(self, name: str, supported: dict[Any, Any], default: Any) -> Any:
        """Return what a field's value stands for; refuse a value that is not supported.

        Raises
        ------
        ModelError
            Naming the field, its value and the values that are supported.
        """
        value = self.get(name, default)
        if value not in supported:
            raise ModelError(
                f"the configuration field {name!r} is {value!r}; {self.kind} models are supported "
                f"with {' or '.join(repr(key) for key in supported)}"
            )
        return supported[value]

    def activation(self, name: str = "hidden_act", default: str = "silu") -> str:
        """Return the MLP's activation: "silu", "gelu" or "gelu_tanh"."""
        known = {
            "silu": "silu",
            "swish": "silu",
            "gelu": "gelu",
            "gelu_new": "gelu_tanh",
            "gelu_pytorch_tanh": "gelu_tanh",
        }
        return self.only(name, known, default)

    def rope(self) -> tuple[float, dict[str, Any]]:
        """Return rope_theta and the scaling dictionary (empty when plain)."""
        scaling = dict(self.values.get("rope_scaling") or {})
        theta = float(self.get("rope_theta", 10000.0))
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        # Dynamic scaling changes nothing up to max_position_embeddings, which is the context.
        if kind in ("default", "dynamic"):
            return theta, {}
        if kind not in ROPE_SCALINGS:
            raise ModelError(
                f"rope_scaling of type {kind!r} is not supported; supported are "
                + ", ".join(ROPE_SCALINGS)
            )
        scaling["rope_type"] = kind
        if kind == "yarn" and not scaling.get("original_max_position_embeddings"):
            scaling["original_max_position_embeddings"] = self.require("max_position_embeddings")
        return theta, scaling

    def sliding_pattern(self, period: int) -> list[str]:
        """Return ``layer_types``, or what ``sliding_window_pattern`` says of each layer.

        That is a period whose last layer is full (``period`` without the field), or letters L and G
        (EXAONE), which repeat; the last layer of all is full then.
        """
        if kinds := self.get("layer_types", None):
            return list(kinds)
        layers, pattern = self.require("num_hidden_layers"), self.get(PATTERN, period)
        if isinstance(pattern, int):
            return [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(layers)]
        if not pattern or set(pattern) - set("LG"):
            raise ModelError(
                f"the configuration field {PATTERN!r} is {pattern!r}; expected a period, or a text "
                "of L (sliding) and G (full)"
            )
        full = [pattern[i % len(pattern)] == "G" or i == layers - 1 for i in range(layers)]
        return [FULL if one else SLIDING for one in full]

    def layer_kinds(self, layers: int, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Return the attention kind of each layer; empty when no layer slides."""
        kinds = tuple(self.get("layer_types", default))
        if len(kinds) not in (0, layers):
            raise ModelError(
                f"the configuration field 'layer_types' has {len(kinds)} entries for {layers} "
                "layers"
            )
        for kind in kinds:
            if kind not in (FULL, SLIDING):
                raise ModelError(
                    f"the configuration field 'layer_types' holds {kind!r}; {self.kind} models are "
                    f"supported with {FULL!r} and {SLIDING!r}"
                )
        return kinds if SLIDING in kinds else ()


def extended(context: int, scaling: dict[str, Any]) -> int:
    """Return the context that a scaling makes of ``max_position_embeddings``.

    Qwen's recipe for YaRN leaves ``max_position_embeddings`` at the trained length; the context is
    then the trained length times the factor, as vLLM has it. (transformers has no longest context.)
    """
    if scaling.get("rope_type") != "yarn":
        return context
    trained = int(scaling["original_max_position_embeddings"])
    if context > trained:
        return context
    return max(context, int(trained * float(scaling.get("factor") or 1.0)))


def check_shape(config: DecoderConfig) -> DecoderConfig:
    """Return a shape whose parts fit together.

    Raises
    ------
    ModelError
        Naming the fields that do not.
    """
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    rotated = size if config.rotary_dim is None else config.rotary_dim
    problem = ""
    if heads % kv_heads:
        problem = f"{heads} attention heads cannot share {kv_heads} key and value heads"
    elif not 0 < size <= MOST_HEAD_DIM or heads * size > MOST_CHANNELS:
        problem = f"{heads} heads of {size} channels are none of a model (hidden_size, head_dim)"
    elif any(config.layer_ropes or (True,)) and (rotated % 2 or not 0 < rotated <= size):
        problem = f"rotary embeddings turn pairs of channels, and {rotated} of {size} are to turn"
    elif config.intermediate_size <= 0:
        problem = f"the intermediate size is {config.intermediate_size}"
    elif len(config.layer_ropes) not in (0, config.num_layers):
        problem = f"{len(config.layer_ropes)} layers are described of {config.num_layers}"
    if problem:
        raise ModelError(f"the configuration of this {config.family} model: {problem}")
    return config


def read_decoder(values: dict[str, Any], family: str, **differences: Any) -> DecoderConfig:
    """Read the fields that all Llama-like configurations share.

    Parameters
    ----------
    values : dict
        The configuration.
    family : str
        Name of the model family.
    differences : optional
        Fields of the DecoderConfig that the family sets itself; they are not read.

    Raises
    ------
    ModelError
        For a field that is missing or that the shared decoder cannot follow.
    """
    read = ConfigReader(values)
    hidden, heads = read.require("hidden_size"), read.require("num_attention_heads")
    layers, context = read.require("num_hidden_layers"), read.require("max_position_embeddings")
    head_dim = int(read.get("head_dim", hidden // heads))
    theta, scaling = read.rope()
    context = extended(context, scaling)
    found = {
        "vocab_size": read.require("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": read.require("intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": int(read.get("num_key_value_heads", heads)),
        "head_dim": head_dim,
        "context_length": context,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": bool(read.get("tie_word_embeddings", False)),
        "qkv_bias": bool(read.get("attention_bias", False)),
        "o_bias": bool(read.get("attention_bias", False)),
        "mlp_bias": bool(read.get("mlp_bias", False)),
    }
    if "activation" not in differences:
        found["activation"] = read.activation()
    if "norm_eps" not in differences:
        found["norm_eps"] = read.require("rms_norm_eps", float)
    share = float(read.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        found["rotary_dim"] = int(head_dim * share)
    if "layer_kinds" not in differences:
        kinds = read.layer_kinds(layers)
        window = int(read.get("sliding_window", 0)) if kinds else 0
        # A window as long as the context hides nothing.
        if window and window < context:
            found |= {"layer_kinds": kinds, "sliding_window": window}
    found = {**found, **differences}
    found |= {f"{group}_bias": True for group in read.get(STORED_BIASES, ())}
    return DecoderConfig(family=family, **found)
