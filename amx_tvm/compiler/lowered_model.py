"""What lowering hands to the build: a module after all passes and its plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from amx_tvm.frontends import ModelSource
from relax_passes import recipes as plans


@dataclass(frozen=True)
class LoweredModel:
    """A module after all passes, and what is known about the model it came from."""

    module: Any
    order: list[str]
    plan: dict[str, plans.Recipe]
    linears: list[dict[str, Any]]
    model: dict[str, Any]
    kv_cache: dict[str, Any]
    functions: list[str]
    weight_count: int
    source: ModelSource
