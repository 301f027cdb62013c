"""The metadata keys of a GGUF model's own name space, such as "llama.block_count".

Every one is read or refused. llama.cpp skips keys that it does not know; a key of an older or newer
converter that changes numbers would then change the model in silence.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.frontends.fields import check_fields

# Keys that describe and do not change numbers.
DESCRIPTIVE = frozenset(
    {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type"}
)

# Keys of parts that no supported architecture has, with the values at which they do nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}


class ModelKeys:
    """The keys of one model, which remembers those that were asked for.

    Parameters
    ----------
    name : str
        The architecture, in front of every key.
    metadata : dict
        All keys of the file.
    path : path-like
        The file, for messages.
    """

    def __init__(self, name: str, metadata: dict[str, Any], path: object) -> None:
        self.name, self.path = name, path
        start = f"{name}."
        self._values = {
            key.removeprefix(start): value
            for key, value in metadata.items()
            if key.startswith(start)
        }
        self._left = set(self._values)

    def get(self, key: str) -> Any:
        """Return a key's value as it is stored, or None."""
        self._left.discard(key)
        return self._values.get(key)

    def number(self, key: str, default: Any = None) -> Any:
        """Return a key that is one number, or an array of one number for every layer.

        Raises
        ------
        ModelError
            For another value, naming the key.
        """
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ModelError(
                f"the key '{self.name}.{key}' in {self.path} is {value!r}; one number was expected "
                "(values that differ between layers are not supported)"
            )
        return value

    def text(self, key: str) -> str | None:
        """Return a key that is a text, or None.

        Raises
        ------
        ModelError
            For another value, naming the key.
        """
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise ModelError(
                f"the key '{self.name}.{key}' in {self.path} is no text, which was expected"
            )
        return value

    def field(self, key: str, name: str) -> Any:
        """Return a number under the bounds of a configuration's field, or None.

        Raises
        ------
        ModelError
            For a value that the field ``name`` cannot have, naming the key.
        """
        value = self.number(key)
        source = f"the key '{self.name}.{key}' in {self.path}"
        return check_fields({name: value}, source)[name]

    def require(self, key: str) -> Any:
        """Return a positive number that must be there."""
        value = self.number(key)
        if value is None:
            raise ModelError(
                f"{self.path} has no key '{self.name}.{key}'; a {self.name} model needs it"
            )
        if value <= 0:
            raise ModelError(
                f"the key '{self.name}.{key}' in {self.path} is {value}; a positive number was "
                "expected, the file is damaged"
            )
        return value

    def equal(self, key: str, expected: float) -> None:
        """Refuse a key that is there with another value than the one that is computed with."""
        value = self.number(key, expected)
        if not np.isclose(value, expected, rtol=1e-5):
            raise ModelError(
                f"the key '{self.name}.{key}' in {self.path} is {value}; {self.name} models are "
                f"supported with {expected:g} here"
            )

    def check_all_read(self) -> None:
        """Refuse the first key that nobody asked for, unless it changes no number.

        Raises
        ------
        ModelError
            With the key and its value.
        """
        for key in sorted(self._left - DESCRIPTIVE):
            value = self.number(key) if key in NEUTRAL else self.get(key)
            if value not in NEUTRAL.get(key, ()):
                shown = "an array" if isinstance(value, np.ndarray | list) else repr(value)
                raise ModelError(
                    f"the key '{self.name}.{key}' in {self.path} is {shown}, which this project "
                    f"does not know for {self.name} models: it may change their numbers; convert "
                    "the model from its Hugging Face directory, or compile that"
                )
