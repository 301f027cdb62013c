"""The registry's rule for linears on CUDA: fragment-packed weights, every number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm

from relax_passes.kernels.base import RowRange, TargetInfo
from relax_passes.spec import LinearSpec

from . import function
from .buckets import Bucket
from .gemv import GemvKnobs
from .tile import TileKnobs


def knobs_to_buckets(knobs: Mapping[str, Any]) -> list[Bucket]:
    """Turn a record's knobs into buckets.

    Parameters
    ----------
    knobs : mapping
        "buckets": list of {"rows": int or None, "schedule": "gemv" or "tile", and the fields of
        GemvKnobs or TileKnobs}, in rising order of rows.
    """
    found = []
    for entry in knobs["buckets"]:
        values = {k: v for k, v in entry.items() if k not in ("rows", "schedule")}
        make = {"gemv": GemvKnobs, "tile": TileKnobs}[entry["schedule"]]
        found.append(Bucket(entry["rows"], make(**values)))
    return found


def kind_of(knobs: GemvKnobs | TileKnobs) -> tuple[str, str]:
    """Name of a bucket's kernel, and what it does in words."""
    if isinstance(knobs, GemvKnobs):
        return "gemv", "fragments into mma.sync"
    if knobs.e4m3:
        return "tile-e4m3", "tiles of E4M3 through shared memory"
    return "tile", "tiles through shared memory"


class CudaLinear:
    """Decode kernel for M <= 16, tile kernel beyond, on sm_80 and later."""

    name = "cuda-fragment"

    def apply(
        self, spec: LinearSpec, target: TargetInfo, knobs: Mapping[str, Any] | None = None
    ) -> tvm.tirx.PrimFunc | None:
        """Build the function, or return None when it is not this rule's."""
        if target.gpu is None or not function.supported(spec):
            return None
        knobs = knobs or {}
        buckets = knobs_to_buckets(knobs) if "buckets" in knobs else None
        dependent = bool(knobs.get("dependent", target.gpu.clusters))
        return function.build(spec, target.gpu, buckets, dependent=dependent)

    def rows(
        self, spec: LinearSpec, target: TargetInfo, knobs: Mapping[str, Any] | None = None
    ) -> tuple[RowRange, ...]:
        """List which kernels the function runs."""
        assert target.gpu is not None, "asked about a kernel of another target"
        if knobs and "buckets" in knobs:
            buckets = knobs_to_buckets(knobs)
        else:
            buckets = function.buckets_of(spec, target.gpu)
        found: list[RowRange] = []
        first = spec.m or 1
        for bucket in buckets:
            name, why = kind_of(bucket.knobs)
            if not found or found[-1].kernel != name:
                found.append(RowRange(first, name, why))
            first = (bucket.rows or first) + 1
        return tuple(found)

    def why(self, spec: LinearSpec, target: TargetInfo) -> str:
        """Name the schedules by number of rows."""
        assert target.gpu is not None, "asked about a kernel of another target"
        ranges = self.rows(spec, target)
        ends = [f" to M = {after.first - 1}" for after in ranges[1:]]
        return "; ".join(r.why + end for r, end in zip(ranges, [*ends, ""], strict=True))


CUDA_RULES = (CudaLinear(),)
