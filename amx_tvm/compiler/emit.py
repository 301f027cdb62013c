"""One kernel of an artifact at every level of its lowering, rebuilt from the manifest.

    relax      the operator, before it is legalized
    tensorir   the scheduled loops that a rule has made of it
    llvm       LLVM's IR                     CPU targets
    asm        the target's assembly         CPU targets
    cuda       CUDA C++                      CUDA targets
    ptx        NVIDIA's intermediate code    CUDA targets; needs nvcc or nvrtc

An artifact holds machine code only; a manifest's entry names everything that a kernel depends on,
so the same rule makes the same kernel again. Knobs of tuning records that were used are not kept in
the manifest: a tuned kernel is shown with its rule's defaults unless the records are given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from amx_tvm.artifact import Manifest
from amx_tvm.errors import ArtifactError, TargetError
from amx_tvm.targets import ResolvedTarget, resolve
from relax_passes.chosen import ChosenKernel, chosen_kernels
from relax_passes.kernels.registry import linear_kernel
from relax_passes.ops import Linear, LinearAttrs
from relax_passes.spec import LinearSpec
from relax_passes.tir_pipeline import PIPELINE
from tuning.lookup import records_for

LEVELS = {
    "relax": ("cpu", "cuda"),
    "tensorir": ("cpu", "cuda"),
    "llvm": ("cpu",),
    "asm": ("cpu",),
    "cuda": ("cuda",),
    "ptx": ("cuda",),
}


def emit(manifest: Manifest, level: str, kernel: str | None = None, records: Any = None) -> str:
    """Return the text of one kernel at one level.

    Parameters
    ----------
    manifest : Manifest
        Of the artifact.
    level : str
        A key of LEVELS.
    kernel : str, optional
        Name of a linear, or a part of one, by default the first; "NAME@M = 1" also names the rows.
    records : path, callable or False, optional
        Tuning records, as for ``amx_tvm.compile``.

    Raises
    ------
    ArtifactError
        When no linear has the name.
    TargetError
        When the artifact's target has no such level.
    """
    device = manifest.target.device
    if level not in LEVELS or device not in LEVELS[level]:
        known = ", ".join(name for name, devices in LEVELS.items() if device in devices)
        raise TargetError(f"{manifest.target.key} has no level {level!r}; it has {known}")
    entry = find(chosen_kernels(manifest.linears), kernel)
    spec = entry.spec.alone
    head = f"{entry.name}: {spec.format} {spec.n} x {spec.k}, {entry.spec.rows}"
    if level == "relax":
        layout = "cuda-fragment" if device == "cuda" else "tile16x32"
        return f"# {head}\n{_relax(spec, entry.name, layout)}"
    import tvm

    target = _target(manifest)
    with target:
        function = linear_kernel(spec, target, _knobs(spec, manifest, records)).func
    function = function.with_attr("global_symbol", "kernel")
    if level == "tensorir":
        return f"# {head}\n{function.script(show_meta=False)}\n"
    if device == "cuda":
        from amx_tvm.targets.cuda.toolchain import compile_source, enable

        enable()
    module = tvm.IRModule({"kernel": function})
    built = tvm.compile(module, target=target, tir_pipeline=PIPELINE).mod
    if level in ("llvm", "asm"):
        mark = ";" if level == "llvm" else "#"
        return f"{mark} {head}\n{built.inspect_source('ll' if level == 'llvm' else 'asm')}"
    sources = (part.inspect_source("cuda") for part in built.imports if part.kind == "cuda")
    source = next(sources, "")
    if level == "ptx":
        source = compile_source(source, manifest.target.features[0], ptx=True).decode()
    return f"// {head}\n{source}"


def find(linears: Sequence[ChosenKernel], kernel: str | None) -> ChosenKernel:
    """Return the entry of a linear by (a part of) its name; see :func:`emit`."""
    wanted, _, rows = (kernel or "").partition("@")
    named = [entry for entry in linears if entry.name == wanted]
    for entry in named or linears:
        if wanted in entry.name and rows in ("", str(entry.spec.rows)):
            return entry
    some = ", ".join(dict.fromkeys(entry.name for entry in linears[:8])) or "none at all"
    raise ArtifactError(f"no linear is called {kernel!r}; the first ones are {some}")


def _knobs(spec: LinearSpec, manifest: Manifest, records: Any) -> Any:
    if not records:
        return None
    kept = manifest.target
    resolved = ResolvedTarget(
        _target(manifest), kept.key, kept.device, "", tuple(kept.features), kept.triple
    )
    chosen = records_for(records, resolved)
    return chosen(spec) if chosen is not None else None


def _target(manifest: Manifest) -> Any:
    """Return TVM's target of the features that the manifest lists."""
    from tvm.target import Target

    kept = manifest.target
    if kept.device == "cuda":
        _, slash, count = kept.key.removeprefix("cuda/").partition("/")
        return resolve(f"cuda:{kept.features[0]}{slash}{count}").tvm
    options: dict[str, Any] = {"kind": "llvm", "num-cores": 2}
    options["mattr"] = [f"+{feature}" for feature in kept.features]
    return Target({**options, "mtriple": kept.triple} if kept.triple else options)


def _relax(spec: LinearSpec, name: str, layout: str) -> str:
    """Print a function that is this one operator."""
    import tvm
    from tvm import relax, tirx

    rows = tirx.Var("rows", "int64") if spec.m is None else tirx.const(spec.m, "int64")
    variables: dict[str, relax.Var] = {}

    def add(label: str, shape: Iterable[Any], dtype: str) -> relax.Var:
        variables[label] = relax.Var(label, relax.TensorType(list(shape), dtype))
        return variables[label]

    # Activation and weight have arrays of the same names, such as codes.
    x = [
        add(label if label == "x" else f"x_{label}", (rows, *shape), dtype)
        for label, shape, dtype in spec.activation_buffers()
    ]
    weights = [
        add(f"w_{label.removeprefix('w_')}", shape, dtype)
        for label, shape, dtype in spec.weight_buffers("" if spec.format == "none" else layout)
    ]
    experts = max(1, spec.experts)
    bias = add("bias", (spec.n * experts,), spec.out_dtype) if spec.bias else None
    out = (rows, spec.out_features)
    residual = add("residual", out, spec.out_dtype) if spec.residual else None
    bounds = add("bounds", (spec.experts + 1,), "int32") if spec.experts else None
    attrs = LinearAttrs(
        name=name,
        n=spec.n,
        k=spec.k,
        format=spec.format,
        layout=layout,
        activation=spec.activation,
        silu_mul=spec.silu_mul,
        out_dtype=spec.out_dtype,
        experts=spec.experts,
    )
    # The call without its type, which Relax infers again where the text is parsed: TVM prints it as
    # metadata, whose symbolic rows are then other rows than the function's.
    call = Linear(attrs, tuple(x), tuple(weights), bias, residual, bounds).call()
    result = relax.TensorType(list(out), spec.out_dtype)
    inner, outer = relax.DataflowVar("lv", result), relax.Var("gv", result)
    bindings = [relax.VarBinding(inner, call), relax.VarBinding(outer, inner)]
    body = relax.SeqExpr([relax.DataflowBlock(bindings)], outer)
    function = relax.Function(list(variables.values()), body, result)
    return tvm.IRModule({"main": function}).script(show_meta=True) + "\n"
