"""One StableHLO operation as its translation sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from amx_tvm.errors import ModelError


@dataclass(frozen=True)
class Operation:
    """One operation: MLIR bindings, the operation, its operands in Relax, its result's type."""

    ir: Any
    op: Any
    operands: list[Any]
    shape: list[int]
    dtype: str

    def integers(self, name: str) -> list[int]:
        """Return an attribute that is an array of integers."""
        return [int(value) for value in self.op.attributes[name]]

    def text(self, name: str) -> str:
        """Return an attribute as MLIR prints it."""
        return str(self.op.attributes[name])

    def refuse(self, what: str) -> ModelError:
        """Return the error for a form of the operation that is not supported."""
        return ModelError(f"{self.op.operation.name} at {self.op.location}: {what}")
