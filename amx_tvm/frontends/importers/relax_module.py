"""A Relax IRModule with its weights, as a source that compile() treats like any other model.

The entry function takes inputs and weights as separate parameters; the weights are those that
``params`` names. Which Relax passes then see ordinary linears is decided by the module, not by
names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.frontends.base import ModelSource

if TYPE_CHECKING:
    from tvm import IRModule


class RelaxModuleSource(ModelSource):
    """A module and the values of some of its parameters.

    Parameters
    ----------
    module : tvm.IRModule
        With the Relax function ``entry``.
    params : mapping of str to array
        Parameter name to its value: NumPy arrays, or anything with ``numpy()`` or DLPack. Kept as
        they are, not copied.
    entry : str
        The function that is compiled to be called.
    name : str
        Name of the model.

    Attributes
    ----------
    module, entry
        As given.
    inputs : list of str
        The entry's parameters that are no weights, in order.

    Raises
    ------
    ModelError
        When the entry is missing, a name is none of its parameters, or a value does not fit the
        declared shape or type.
    """

    kind = "function"

    def __init__(
        self,
        module: IRModule,
        params: Mapping[str, Any] | None = None,
        entry: str = "main",
        name: str = "module",
    ) -> None:
        from tvm import relax

        functions = {var.name_hint: function for var, function in module.functions.items()}
        function = functions.get(entry)
        if not isinstance(function, relax.Function):
            relax_names = [key for key, f in functions.items() if isinstance(f, relax.Function)]
            raise ModelError(
                f"the module has no Relax function {entry!r}; it has: "
                + (", ".join(relax_names) or "none")
            )
        self.module = module
        self.entry = entry
        self.name = name
        self.config = {"model_type": "relax", "architectures": ["IRModule"]}
        self.generation_config = {"eos_token_id": []}
        self._arrays = {key: _to_numpy(key, value) for key, value in (params or {}).items()}
        variables = {var.name: var for var in function.params}
        for key, array in self._arrays.items():
            if key not in variables:
                raise ModelError(
                    f"the weight {key!r} is no parameter of {entry!r}; its parameters are: "
                    + ", ".join(variables)
                )
            _check(key, array, variables[key].ty)
        self.inputs = [key for key in variables if key not in self._arrays]

    def names(self) -> list[str]:
        """Return the names of the weights."""
        return list(self._arrays)

    def array(self, name: str) -> np.ndarray:
        """Return a weight in its own type, without a copy."""
        if name not in self._arrays:
            raise self.missing(name)
        return self._arrays[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        return self.array(name).shape

    def dtype(self, name: str) -> str:
        """Return the weight's type as NumPy calls it."""
        return str(self.array(name).dtype)

    def load(self, name: str) -> np.ndarray:
        """Return a weight as a new float32 array."""
        return np.array(self.array(name), dtype=np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(array.nbytes for array in self._arrays.values())

    def write_tokenizer(self, directory: str | os.PathLike[str]) -> list[str]:
        """Write nothing: a function has no tokenizer."""
        return []

    def digest(self) -> str:
        """Return a sha256 over the module's text and its weights' bytes."""
        digest = hashlib.sha256(self.module.script().encode())
        for name, array in self._arrays.items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()


def _to_numpy(name: str, value: Any) -> np.ndarray:
    """Return an array's values; TVM tensors and torch tensors have ``numpy()``."""
    array = value.numpy() if hasattr(value, "numpy") else np.asarray(value)
    if array.dtype.kind not in "fiub" and str(array.dtype) != "bfloat16":
        raise ModelError(f"the weight {name!r} has the type {array.dtype}; numbers were expected")
    return array


def _check(name: str, array: np.ndarray, declared: Any) -> None:
    """Compare a value with the parameter's declared type; symbolic sizes fit anything."""
    from tvm import relax, tirx

    if not isinstance(declared, relax.TensorType):
        raise ModelError(f"the parameter {name!r} is no tensor, so it cannot be a weight")
    if declared.dtype and declared.dtype != str(array.dtype):
        raise ModelError(
            f"the weight {name!r} is {array.dtype}, the module declares {declared.dtype}"
        )
    if declared.shape is None:
        return
    sizes = [int(size) if isinstance(size, tirx.IntImm) else None for size in declared.shape]
    fits = len(sizes) == array.ndim and all(
        size is None or size == given for size, given in zip(sizes, array.shape, strict=True)
    )
    if not fits:
        raise ModelError(
            f"the weight {name!r} has the shape {list(array.shape)}, the module declares "
            f"{[size if size is not None else '?' for size in sizes]}"
        )
