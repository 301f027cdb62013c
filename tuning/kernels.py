"""The identity of a kernel: what a record is about, and the revision of the schedule behind it.

The revision is a digest of the kernel's TensorIR with its default knobs. Any change of a schedule
that changes the code it emits changes the revision, and records of the old code are refused; a
comment or a renamed variable in a schedule's source does not.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from relax_passes.schedules.spec import LinearSpec

ANY_ROWS = "M >= 1"


def bucket(spec: LinearSpec) -> str:
    """Return the rows that a kernel is compiled for, as manifests write them."""
    return ANY_ROWS if spec.m is None else f"M = {spec.m}"


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
        "M = 1" or "M >= 1".
    n, k : int
        Rows and columns of W.
    activation, epilogue, out_dtype : str
        As in ``LinearSpec``.
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

    @property
    def problem(self) -> tuple:
        """Everything but the schedule: what the kernel computes."""
        fields = asdict(self)
        return tuple(v for name, v in fields.items() if name not in ("template", "revision"))

    @property
    def text(self) -> str:
        """One line for people."""
        epilogue = f" +{self.epilogue}" if self.epilogue else ""
        return (
            f"{self.format}:{self.activation} {self.n}x{self.k} {self.bucket}{epilogue} "
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
    rows = str(entry["bucket"])
    return LinearSpec(
        format=entry["format"],
        n=int(n),
        k=int(k),
        activation=entry["activation"],
        m=None if rows == ANY_ROWS else int(rows.removeprefix("M = ")),
        bias="bias" in parts,
        residual="residual" in parts,
        silu_mul="silu_mul" in parts,
        out_dtype=str(entry.get("out_dtype", out_dtype)),
    )


def identity(spec: LinearSpec, target: Any, layout: str) -> KernelId:
    """Return the identity of a kernel as the schedules of this installation build it.

    Parameters
    ----------
    spec : LinearSpec
        The kernel.
    target : tvm.target.Target
        What it is built for.
    layout : str
        Packed weight layout of the target.
    """
    from relax_passes.schedules.registry import linear_kernel

    kernel = linear_kernel(spec, target)
    text = kernel.func.without_attr("global_symbol").script(show_meta=True)
    return KernelId(
        format=spec.format,
        layout=layout,
        template=kernel.rule,
        revision=hashlib.sha256(text.encode()).hexdigest()[:12],
        bucket=bucket(spec),
        n=spec.n,
        k=spec.k,
        activation=spec.activation,
        epilogue=spec.epilogue,
        out_dtype=spec.out_dtype,
    )
