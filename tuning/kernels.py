"""The identity of a kernel: what a record is about, and the revision of the schedule behind it.

The revision is a digest of the kernel's TensorIR with its default knobs. Any change of a schedule
that changes the code it emits changes the revision, and records of the old code are refused; a
comment or a renamed variable in a schedule's source does not.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from relax_passes.activation import Activation
from relax_passes.spec import LinearSpec

ANY_ROWS = "M >= 1"
# What a kernel's identity says in fields of its own; others of a specification are its options.
_NAMED = {
    *("format", "n", "k", "activation", "m", "m_max"),
    *("bias", "residual", "silu_mul", "out_dtype"),
}


def bucket(spec: LinearSpec, rows: int | None = None) -> str:
    """Return the rows that a kernel is compiled for, as manifests write them.

    A CUDA function is a list of kernels by number of rows, each tuned by itself: "M <= 8".
    """
    if rows is not None:
        return f"M <= {rows}"
    return ANY_ROWS if spec.m is None else f"M = {spec.m}"


def rows_of(text: str) -> int | None:
    """Return R of a bucket "M <= R", else None."""
    return int(text.removeprefix("M <= ")) if text.startswith("M <= ") else None


@dataclass(frozen=True)
class KernelId:
    """What a record was made for; equal identities are the same kernel on the same target.

    Attributes
    ----------
    format, layout : str
        Number format and packed layout of the weights.
    template, revision : str
        The schedule rule's name and the digest of its code for this kernel.
    bucket : str
        "M = 1", "M >= 1" or, for one kernel of a CUDA function, "M <= 8".
    n, k : int
        Rows and columns of W.
    activation, epilogue, out_dtype : str
        As in ``LinearSpec``.
    options : str
        JSON of what else the specification says, such as a folded norm; "" for nothing.
    """

    format: str
    layout: str
    template: str
    revision: str
    bucket: str
    n: int
    k: int
    activation: str
    epilogue: str
    out_dtype: str
    options: str = ""

    @property
    def problem(self) -> tuple:
        """Everything but the schedule: what the kernel computes."""
        fields = asdict(self)
        return tuple(v for name, v in fields.items() if name not in ("template", "revision"))

    @property
    def text(self) -> str:
        """One line for people."""
        epilogue = f" +{self.epilogue}" if self.epilogue else ""
        options = f" {self.options}" if self.options else ""
        return (
            f"{self.format}:{self.activation} {self.n}x{self.k} {self.bucket}{epilogue}{options} "
            f"[{self.template} {self.revision}]"
        )


def spec_of(entry: dict[str, Any], out_dtype: str = "float32") -> LinearSpec:
    """Return the specification of a manifest's linear or of a record's kernel.

    Parameters
    ----------
    entry : dict
        "format", "shape" [N, K] or "n" and "k", "activation", "epilogue", "bucket".
    out_dtype : str
        Type of y where the entry does not say it.
    """
    n, k = entry["shape"] if "shape" in entry else (entry["n"], entry["k"])
    parts = str(entry["epilogue"]).split("+")
    text = str(entry["bucket"])
    others = {f.name for f in fields(LinearSpec)} - _NAMED
    options = {name: entry[name] for name in others if name in entry}
    if entry.get("options"):
        options.update(json.loads(entry["options"]))
    return LinearSpec(
        format=entry["format"],
        n=int(n),
        k=int(k),
        activation=Activation.parse(entry["activation"]),
        m=int(text.removeprefix("M = ")) if text.startswith("M = ") else None,
        bias="bias" in parts,
        residual="residual" in parts,
        silu_mul="silu_mul" in parts,
        out_dtype=str(entry.get("out_dtype", out_dtype)),
        **options,
    )


def options_of(spec: LinearSpec) -> str:
    """Return what a specification says beyond the named fields, as JSON; "" for nothing."""
    other = {
        f.name: getattr(spec, f.name)
        for f in fields(spec)
        if f.name not in _NAMED and getattr(spec, f.name) != f.default
    }
    return json.dumps(other, sort_keys=True) if other else ""


def build(
    spec: LinearSpec, target: Any, knobs: dict[str, Any] | None = None, rows: int | None = None
) -> Any:
    """Build a kernel as its schedule does: ``relax_passes.kernels.registry.Kernel``.

    Parameters
    ----------
    spec : LinearSpec
        The kernel.
    target : tvm.target.Target
        What it is built for.
    knobs : dict, optional
        A point of its space; the defaults otherwise.
    rows : int, optional
        Build only the kernel of a CUDA function that runs up to so many rows, for any M.
    """
    from relax_passes.kernels.registry import linear_kernel

    if rows is not None:
        from tuning import cuda_buckets

        spec = cuda_buckets.general(spec)
        knobs = cuda_buckets.one(spec, target, rows, knobs)
    return linear_kernel(spec, target, knobs)


def identity(spec: LinearSpec, target: Any, layout: str, rows: int | None = None) -> KernelId:
    """Return the identity of a kernel as the schedules of this installation build it.

    Parameters
    ----------
    spec : LinearSpec
        The kernel.
    target : tvm.target.Target
        What it is built for.
    layout : str
        Packed weight layout of the target.
    rows : int, optional
        As for ``build``.
    """
    kernel = build(spec, target, None, rows)
    text = kernel.func.without_attr("global_symbol").script(show_meta=True)
    return KernelId(
        format=spec.format,
        layout=layout,
        template=kernel.rule,
        revision=hashlib.sha256(text.encode()).hexdigest()[:12],
        bucket=bucket(spec, rows),
        n=spec.n,
        k=spec.k,
        activation=str(spec.activation),
        epilogue=spec.epilogue,
        out_dtype=spec.out_dtype,
        options=options_of(spec),
    )
