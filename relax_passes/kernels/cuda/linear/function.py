"""One PrimFunc a linear: y = x W^T with its epilogue, for every number of rows of x.

The function takes the arguments of `buffers.argument_shapes` and launches, by M, the kernel of the
first bucket that holds it; each bucket is a device kernel of its own. With a fixed M one kernel is
left.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from amx_tvm.formats import e4m3
from amx_tvm.targets.cuda.gpus import Gpu
from relax_passes.activation import Scheme
from relax_passes.spec import LinearSpec

from . import buffers, gemv, tile
from .buckets import Bucket, default_buckets
from .experts import expert_buckets

# TVM 0.27's own spelling
_DEPENDENT = "tirx.use_programtic_dependent_launch"


def supported(spec: LinearSpec) -> bool:
    """Whether the CUDA schedules compute a linear: 16-byte rows of x, float16 in and out."""
    held = spec.activation.exact or spec.activation.scheme in (Scheme.ROUNDED, Scheme.E4M3)
    if not held or spec.out_dtype != "float16":
        return False
    if buffers.in_e4m3(spec) and (spec.experts or spec.k % 16 or not e4m3.holds(spec.fmt)):
        return False
    added = spec.residual and not spec.joined
    if spec.experts and (added or spec.n % 16 or not _addressable(spec)):
        return False
    if spec.silu_mul and (spec.n % 32 or spec.residual):
        return False
    return spec.k % 8 == 0


def _addressable(spec: LinearSpec) -> bool:
    """Whether 32 bits count the bytes of all experts' codes."""
    ((_, shape, _), *_) = spec.weight_buffers(buffers.layout_of(spec))
    return prod(shape) < 2**31


def buckets_of(spec: LinearSpec, gpu: Gpu) -> list[Bucket]:
    """Return the kernels of a linear, in rising order of rows: the defaults."""
    shape = buffers.fragment_shape(spec)
    return (expert_buckets if spec.experts else default_buckets)(spec, shape, gpu)


def build(
    spec: LinearSpec,
    gpu: Gpu,
    buckets: Sequence[Bucket] | None = None,
    name: str = "main",
    dependent: bool = False,
) -> tirx.PrimFunc:
    """Build the function of a linear.

    Parameters
    ----------
    spec : LinearSpec
        Sizes, format and epilogue; `m` None for any number of rows.
    gpu : Gpu
        What the kernels are made for.
    buckets : sequence of Bucket, optional
        Kernels in rising order of rows; the defaults for the GPU when omitted.
    name : str
        Global symbol.
    dependent : bool
        Launch every kernel of the function while the kernel before it still runs (its weights are
        requested, its activations waited for). sm_90 and later.

    Raises
    ------
    ValueError
        When `supported` says no, or dependent launch is asked of an older architecture.
    """
    if not supported(spec):
        raise ValueError(f"no CUDA schedule for {spec}")
    if dependent and not gpu.clusters:
        raise ValueError(f"dependent launch needs sm_90 or later, not {gpu.arch}")
    if buckets is None:
        buckets = buckets_of(spec, gpu)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            attrs: dict = {"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True}
            if dependent:
                attrs["tirx.kernel_launch_params"] = [_DEPENDENT]
            T.func_attr(attrs)
            linear = buffers.declare(spec)
            _dispatch(linear, list(buckets), gpu, dependent)
    return builder.get()


def _dispatch(linear: buffers.Linear, left: list[Bucket], gpu: Gpu, dependent: bool) -> None:
    """Emit `if m <= rows: kernel, else: the rest`."""
    bucket, rest = left[0], left[1:]
    if not rest:
        _emit(linear, bucket, gpu, dependent)
        return
    assert bucket.rows is not None
    with T.If(linear.m <= bucket.rows):
        with T.Then():
            one = bucket.rows == 1 and not bucket.item
            _emit(linear.with_rows(1) if one else linear, bucket, gpu, dependent)
        with T.Else():
            _dispatch(linear, rest, gpu, dependent)


def _emit(linear: buffers.Linear, bucket: Bucket, gpu: Gpu, dependent: bool) -> None:
    """Emit one kernel."""
    values = {**vars(bucket.knobs), "dependent": dependent}
    if isinstance(bucket.knobs, gemv.GemvKnobs):
        rows = bucket.item or bucket.rows or 8
        gemv.emit(linear, rows, gemv.GemvKnobs(**values))
    else:
        tile.emit(linear, tile.TileKnobs(**values), gpu)
