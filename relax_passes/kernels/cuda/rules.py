"""The registry's rule for linears on CUDA: fragment-packed weights, every number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm

from relax_passes.kernels.base import TargetInfo
from relax_passes.spec import LinearSpec

from . import linear
from .buckets import Bucket, default_buckets
from .buffers import format_of, shape_of
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


class CudaLinear:
    """Decode kernel for M <= 16, tile kernel beyond, on sm_80 and later."""

    name = "cuda-fragment"

    def apply(
        self, spec: LinearSpec, target: TargetInfo, knobs: Mapping[str, Any] | None = None
    ) -> tvm.tirx.PrimFunc | None:
        """Build the function, or return None when it is not this rule's."""
        if target.gpu is None or not linear.supported(spec):
            return None
        knobs = knobs or {}
        buckets = knobs_to_buckets(knobs) if "buckets" in knobs else None
        dependent = bool(knobs.get("dependent", target.gpu.clusters))
        return linear.build(spec, target.gpu, buckets, dependent=dependent)

    def why(self, spec: LinearSpec, target: TargetInfo) -> str:
        """Name the schedules by number of rows."""
        assert target.gpu is not None, "asked about a kernel of another target"
        shape = shape_of(format_of(spec))
        names = {GemvKnobs: "fragments into mma.sync", TileKnobs: "tiles through shared memory"}
        parts: list[list] = []
        for bucket in default_buckets(spec, shape, target.gpu):
            text = names[type(bucket.knobs)]
            if not parts or parts[-1][0] != text:
                parts.append([text, bucket.rows])
            parts[-1][1] = bucket.rows
        limits = [f"{text}" + (f" to M = {rows}" if rows else "") for text, rows in parts]
        return "; ".join(limits)


CUDA_RULES = (CudaLinear(),)
