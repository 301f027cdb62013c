"""The identity of a kernel: what a record is about, and the revision of the schedule behind it.

The revision is a digest of the kernel's TensorIR with its default knobs. Any change of a schedule
that changes the code it emits changes the revision, and records of the old code are refused; a
comment or a renamed variable in a schedule's source does not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amx_tvm.schema import Count, conform
from relax_passes.spec import LinearSpec, Rows


@dataclass(frozen=True)
class KernelId:
    """What a record was made for; equal identities are the same kernel on the same target.

    Attributes
    ----------
    spec : LinearSpec
        What the kernel computes.
    rows : int or None
        A CUDA function is a list of kernels by number of rows, each tuned by itself: the one that
        runs up to so many.
    layout : str
        Packed layout of the weights.
    template, revision : str
        The schedule rule's name and the digest of its code for this kernel.
    """

    spec: LinearSpec
    rows: int | None
    layout: str
    template: str
    revision: str

    @property
    def problem(self) -> tuple:
        """Everything but the schedule: what the kernel computes."""
        return (self.spec, self.rows, self.layout)

    @property
    def runs(self) -> Rows:
        """The rows that it runs for."""
        return self.spec.rows_up_to(self.rows)

    @property
    def text(self) -> str:
        """One line for people."""
        spec, epilogue = self.spec, f" +{self.spec.epilogue}" if self.spec.epilogue else ""
        return (
            f"{spec.format}:{spec.activation} {spec.n}x{spec.k} {self.runs}{epilogue} "
            f"[{self.template} {self.revision}]"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the identity as records, logs and packages hold it."""
        return {**vars(self), "spec": self.spec.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> KernelId:
        """Read what ``to_json`` wrote, which may be damaged.

        Raises
        ------
        ValueError, FormatError
            For missing or unknown fields, and values that no kernel has.
        """
        line = conform(_Line, data)
        return KernelId(**{**vars(line), "spec": LinearSpec.from_json(line.spec)})


@dataclass(frozen=True)
class _Line:
    """The JSON form of a KernelId."""

    spec: dict[str, Any]
    layout: str
    template: str
    revision: str
    rows: Count | None = None


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
    text = _plain(kernel.func.without_attr("global_symbol").script(show_meta=True))
    revision = hashlib.sha256(text.encode()).hexdigest()[:12]
    return KernelId(spec, rows, layout, kernel.rule, revision)


def _plain(script: str) -> str:
    """Return a printed function as TVM prints it for Python before 3.12.

    Since then it writes variables of shapes as type parameters, `def main[m](...)`.
    """
    found = re.search(r"^def main\[(.*?)\]\(", script, re.MULTILINE)
    if found is None:
        return script
    text = script.replace(found[0], "def main(", 1)
    text = text.replace(
        "from __future__ import annotations\n\n", "# from typing import TypeVar\n", 1
    )
    made = "".join(f'{name} = TypeVar("{name}")\n' for name in found[1].split(", "))
    return re.sub(r"^@T\.prim_func", made + "@T.prim_func", text, count=1, flags=re.MULTILINE)
