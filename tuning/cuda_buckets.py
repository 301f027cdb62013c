"""CUDA functions as tuning sees them: each kernel of a function is tuned by itself.

The function of a linear holds one kernel for each bucket of rows (relax_passes/kernels/cuda/linear/
buckets.py). A task is one bucket, its record says "M <= 8", and a function is put together from the
defaults and the records that there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cuda.linear.buckets import Bucket, default_buckets
from relax_passes.kernels.cuda.linear.buffers import fragment_shape
from relax_passes.kernels.cuda.linear.gemv import GemvKnobs
from relax_passes.spec import LinearSpec

# Values beside the default, for each kind of kernel; what does not fit a shape fails to build.
GEMV = {
    "warps": (4, 7, 8, 14, 16),
    "inflight": (1, 2, 4, 8),
    "tiles": (1, 2, 4),
    "buffers": (1, 2),
    "diagonal": (2, 4, 8),
    "scaled_weights": (0, 1),
}
TILE = {
    "block_m": (8, 16, 32, 64, 128, 256),
    "groups": (1, 2, 3, 4),
    "stages": (4, 6, 8, 10, 12),
    "cluster": (1, 2, 4, 8),
    "share": (1, 2),
    "parallel": (1, 2),
    "producer": (0, 1),
    "persistent": (0, 1),
}


def general(spec: LinearSpec) -> LinearSpec:
    """Return the linear as its kernels are tuned: for any M."""
    return replace(spec, m=None)


def buckets_of(spec: LinearSpec, target: Any) -> list[Bucket]:
    """Return the default buckets of a linear for any number of rows."""
    gpu = TargetInfo.of(target).gpu
    assert gpu is not None, "CUDA buckets of a target that is none"
    return default_buckets(general(spec), fragment_shape(spec), gpu)


def default(spec: LinearSpec, target: Any, rows: int) -> Bucket:
    """Return the default bucket that M = rows falls into.

    Raises
    ------
    ValueError
        When no bucket ends at this number of rows.
    """
    for found in buckets_of(spec, target):
        if found.rows == rows or (rows == spec.m and found.rows is None):
            return found
    raise ValueError(f"no kernel of {spec} ends at {rows} rows")


def space(spec: LinearSpec, target: Any, rows: int) -> tuple[dict[str, tuple], dict[str, int]]:
    """Return (values of each knob, the default point) of one bucket."""
    knobs = default(spec, target, rows).knobs
    if isinstance(knobs, GemvKnobs):
        values = {
            **GEMV,
            "tiles": tuple(t for t in GEMV["tiles"] if t % (1 + spec.silu_mul) == 0),
            # the default, 8, stands for as many as fit; the same number twice is no other point
            "diagonal": tuple(d for d in GEMV["diagonal"] if d * rows < 8),
            # above 8 rows it is always so
            "scaled_weights": GEMV["scaled_weights"] if rows <= 8 else (0,),
        }
    else:
        largest = 2 * rows  # larger blocks of x would be mostly empty
        values = {**TILE, "block_m": tuple(b for b in TILE["block_m"] if b <= largest)}
    point = {name: int(getattr(knobs, name)) for name in values}
    return {n: tuple(sorted({*v, point[n]})) for n, v in values.items()}, point


def entry(bucket: Bucket, point: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Return a bucket as records' knobs write it, with other values where a point has them."""
    values = {f.name: getattr(bucket.knobs, f.name) for f in fields(bucket.knobs)}
    for name, value in (point or {}).items():
        values[name] = type(values[name])(value)
    kind = "gemv" if isinstance(bucket.knobs, GemvKnobs) else "tile"
    return {"rows": bucket.rows, "schedule": kind, **values}


def one(
    spec: LinearSpec, target: Any, rows: int, point: Mapping[str, int] | None
) -> dict[str, Any]:
    """Return the knobs of a function with the kernel of one bucket alone, for any M up to it."""
    return {"buckets": [entry(default(spec, target, rows), point)]}


def function(
    spec: LinearSpec, target: Any, points: Mapping[int, Mapping[str, int]]
) -> dict[str, Any]:
    """Return the knobs of a whole function: the defaults, and points for some numbers of rows.

    With a fixed M only the bucket that M falls into is left.
    """
    buckets = buckets_of(spec, target)
    if spec.m is not None:
        fitting = [b for b in buckets if b.rows is None or b.rows >= spec.m]
        buckets = fitting[:1]
    return {"buckets": [entry(b, points.get(b.rows or 0)) for b in buckets]}
