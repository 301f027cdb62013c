"""Targets: what a user may name, and what each name means to TVM and to the kernels.

    "llvm"                     the CPU of this machine, with exactly the extensions it has
    "llvm:x86-64-v4"           any LLVM CPU name
    "cuda"                     the GPU of this machine
    "cuda:sm_90a"              an architecture; needs no GPU here
    "raspberry-pi/4b-aarch64"  a row of the table below, or any TVM target tag

One row in ``ROWS`` adds a target.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from amx_tvm.artifact import TargetRecord
from amx_tvm.artifact.cpu import cpu_features, normalize
from amx_tvm.errors import TargetError

# Instruction-set extensions that LLVM may use in code for us. What else LLVM lists for a CPU are
# tuning hints, or instructions of operating systems that virtual machines often hide.
_EXTENSIONS = (
    "sse3 ssse3 sse4.1 sse4.2 popcnt lzcnt movbe bmi bmi2 fma f16c avx avx2 avxvnni avxvnniint8 "
    "avx512f avx512bw avx512cd avx512dq avx512vl avx512ifma avx512vbmi avx512vbmi2 avx512vnni "
    "avx512bitalg avx512vpopcntdq avx512bf16 avx512fp16 gfni aes vaes pclmul vpclmulqdq sha adx "
    "neon dotprod fullfp16 fp16fml bf16 i8mm lse rdm crc sha2 sha3 sve sve2"
).split()


@dataclass(frozen=True)
class TargetRow:
    """A named target.

    ``options`` are TVM target options (or ``tag``); ``layout`` is the packed weight layout that
    its kernels read; ``state`` says what has run on it, for ``amx-tvm devices`` and the docs.
    """

    name: str
    device: str
    layout: str
    state: str
    options: dict[str, Any] = field(default_factory=dict)


ROWS = (
    TargetRow("llvm", "cpu", "tile16x32", "this machine's CPU"),
    TargetRow("cuda", "cuda", "cuda-fragment", "this machine's GPU"),
    TargetRow(
        "x86-64-v4+vnni",
        "cpu",
        "tile16x32",
        "servers with AVX-512 VNNI, VBMI and BF16 (Ice Lake has no BF16; Zen 4 and later have)",
        {
            "kind": "llvm",
            "mcpu": "x86-64-v4",
            "mattr": ["+avx512vnni", "+avx512vbmi", "+avx512bf16"],
        },
    ),
    TargetRow(
        "x86-64-v3",
        "cpu",
        "tile16x32",
        "any x86-64 with AVX2",
        {"kind": "llvm", "mcpu": "x86-64-v3"},
    ),
)


@dataclass(frozen=True)
class ResolvedTarget:
    """A target with everything known about it.

    Attributes
    ----------
    tvm : tvm.target.Target
        With the number of cores (CPU) and its host.
    key : str
        Exact identity, used for tuning records: kind, architecture and CPU or GPU name.
    device : str
        "cpu" or "cuda".
    layout : str
        Packed weight layout.
    features : tuple of str
        Instruction-set extensions that the code may use.
    """

    tvm: Any
    key: str
    device: str
    layout: str
    features: tuple[str, ...]
    triple: str

    def record(self) -> TargetRecord:
        """Return what the manifest says about the target."""
        return TargetRecord(
            self.key, str(self.tvm.kind.name), self.triple, list(self.features), self.device
        )


def resolve(name: str) -> ResolvedTarget:
    """Resolve a target's name.

    Raises
    ------
    TargetError
        For an unknown name, CPU or architecture, and for "cuda" where no GPU is found.
    """
    kind, _, detail = name.partition(":")
    if kind == "cuda":
        from amx_tvm.cuda_build import cuda_target

        target = cuda_target(detail or None)
        arch = str(target.attrs["arch"])
        return ResolvedTarget(target, f"cuda/{arch}", "cuda", "cuda-fragment", (arch,), "")
    if kind == "llvm":
        return _cpu(_host_options() if not detail else _named_cpu(detail))
    for row in ROWS:
        if row.name == name:
            return _cpu(dict(row.options))
    from tvm.target import Target

    try:
        target = Target(name)
    except Exception as error:
        raise TargetError(
            f"unknown target {name!r}; known are llvm, llvm:CPU, cuda, cuda:sm_NN, "
            + ", ".join(r.name for r in ROWS if r.options)
            + " and TVM's tags such as raspberry-pi/4b-aarch64"
        ) from error
    if target.kind.name != "llvm":
        raise TargetError(
            f"target {name!r} is of kind {target.kind.name}; artifacts are made for llvm and cuda"
        )
    return _cpu({}, target)


def _host_options() -> dict[str, Any]:
    """Return this CPU's LLVM name, without the extensions that the machine hides."""
    from tvm.target import Target, codegen

    cpu = str(codegen.llvm_get_system_cpu())
    options: dict[str, Any] = {"kind": "llvm", "mcpu": cpu}
    present = cpu_features()
    if present:
        claimed = _extensions(Target(options))
        hidden = [f"-{f}" for f in claimed if normalize(f) not in present]
        if hidden:
            options["mattr"] = hidden
    return options


def _named_cpu(name: str) -> dict[str, Any]:
    from tvm.target import codegen

    if not codegen.llvm_is_valid_cpu(name, codegen.llvm_get_system_triple()):
        raise TargetError(
            f"LLVM knows no CPU {name!r} for this architecture; examples are x86-64-v3, "
            "x86-64-v4, znver4, icelake-server. Other architectures are named by tags such as "
            "raspberry-pi/4b-aarch64"
        )
    return {"kind": "llvm", "mcpu": name}


def _cpu(options: dict[str, Any], target: Any = None) -> ResolvedTarget:
    from tvm.target import Target, codegen

    if target is None:
        options.setdefault("num-cores", os.cpu_count() or 1)
        target = Target(options)
    triple = str(target.attrs.get("mtriple") or codegen.llvm_get_system_triple())
    arch = triple.split("-")[0].replace("_", "-")
    cpu = str(target.attrs.get("mcpu") or "generic")
    features = _extensions(target)
    switched = [str(f) for f in target.attrs.get("mattr") or []]
    key = "/".join(["llvm", arch, cpu + "".join(sorted(switched))])
    return ResolvedTarget(target, key, "cpu", "tile16x32", features, triple)


def _extensions(target: Any) -> tuple[str, ...]:
    from tvm.target import codegen

    switched_off = {str(f)[1:] for f in target.attrs.get("mattr") or [] if str(f).startswith("-")}
    found = {str(f) for f in codegen.llvm_get_cpu_features(target)} - switched_off
    return tuple(f for f in _EXTENSIONS if f in found)
