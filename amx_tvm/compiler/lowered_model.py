"""What lowering hands to the build: a module after all passes and its plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from amx_tvm.compiler.adapters import Adapters
from amx_tvm.compiler.balance import Balance
from amx_tvm.frontends import ModelSource
from relax_passes import recipes as plans
from relax_passes.passes import bundle_parameters, legalize


@dataclass(frozen=True)
class LoweredModel:
    """A module after all passes, and what is known about the model it came from."""

    module: Any
    model: dict[str, Any]
    kv_cache: dict[str, Any]
    functions: list[str]
    weight_count: int
    source: ModelSource
    adapters: Adapters | None = None
    balance: Balance | None = None

    @cached_property
    def order(self) -> list[str]:
        """Names of the parameters, as the functions take them."""
        return bundle_parameters.order_of(self.module)

    @cached_property
    def plan(self) -> dict[str, plans.Recipe]:
        """How each parameter is made of the source's weights."""
        return plans.read(self.module)

    @cached_property
    def linears(self) -> list[dict[str, Any]]:
        """What each linear became, for the manifest."""
        return legalize.kernels_of(self.module)
