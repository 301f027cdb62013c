"""Where calibrated parameters wait for the compiler: one file each, read again one at a time.

A store is a pair of read-only mappings, `quantized` and `floats`, as `compile(overrides=...)` takes
them. Values are loaded from disk at each access and never cached, so that memory stays bounded by
one parameter however large the model is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from amx_tvm import formats
from amx_tvm.errors import CalibrationError
from amx_tvm.formats import Quantized

Value = TypeVar("Value", Quantized, np.ndarray)
FORMAT, CODES, TENSOR, SCALE, FLOAT = "format", "codes", "tensor_scale", "scale:", "float"


class _Files(Mapping[str, Value], Generic[Value]):
    def __init__(self, directory: Path, quantized: bool) -> None:
        self.directory, self.kind = directory, ".q.npz" if quantized else ".f.npz"

    def __getitem__(self, name: str) -> Value:
        path = self.directory / (name + self.kind)
        if not path.is_file():
            raise KeyError(name)
        with np.load(path, allow_pickle=False) as arrays:
            return _read(arrays)  # type: ignore[return-value]

    def __contains__(self, name: object) -> bool:
        return (self.directory / f"{name}{self.kind}").is_file()

    def __iter__(self) -> Iterator[str]:
        found = sorted(self.directory.glob("*" + self.kind))
        return (path.name.removesuffix(self.kind) for path in found)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _read(arrays: Mapping[str, np.ndarray]) -> Quantized | np.ndarray:
    if FLOAT in arrays:
        return arrays[FLOAT]
    stored = {k.removeprefix(SCALE): arrays[k] for k in arrays if k.startswith(SCALE)}
    scale = arrays[TENSOR] if TENSOR in arrays else None
    return Quantized(arrays[CODES], stored, formats.get(str(arrays[FORMAT])), scale)


class Store:
    """Calibrated parameters in a directory that is empty or made here.

    Raises
    ------
    CalibrationError
        When the directory already holds something.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        if any(self.directory.iterdir()):
            raise CalibrationError(
                f"{self.directory} is not empty; calibration writes to an empty directory"
            )
        self.quantized: Mapping[str, Quantized] = _Files(self.directory, True)
        self.floats: Mapping[str, np.ndarray] = _Files(self.directory, False)

    def put(self, name: str, value: Quantized | np.ndarray) -> None:
        """Write one parameter, over an earlier value of the same name."""
        if isinstance(value, np.ndarray):
            np.savez(self.directory / f"{name}.f.npz", float=value)
            return
        arrays: dict[str, Any] = {FORMAT: np.asarray(value.format.name), CODES: value.codes}
        arrays |= {SCALE + key: array for key, array in value.scales.items()}
        if value.tensor_scale is not None:
            arrays[TENSOR] = np.asarray(value.tensor_scale, np.float32)
        np.savez(self.directory / f"{name}.q.npz", **arrays)
