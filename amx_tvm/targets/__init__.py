"""Targets: what a user may name, and what each name means to TVM and to the kernels.

    "llvm"                     the CPU of this machine, with exactly the extensions it has
    "llvm:x86-64-v4"           any LLVM CPU name
    "cuda"                     the GPU of this machine
    "cuda:h200"                a GPU by its name; needs none here
    "cuda:sm_90a"              an architecture
    "cuda:sm_90a/114"          its GPU with 114 multiprocessors
    "cuda:sm_80+sm_89+sm_90"   several in one artifact, with the schedules that all can run
    "raspberry-pi/4b-aarch64"  a row of the table below, or any TVM target tag

One row in ``ROWS`` adds a target.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from amx_tvm.artifact import TargetRecord
from amx_tvm.artifact.cpu import cpu_features, limit, normalize
from amx_tvm.errors import TargetError

# Instruction-set extensions that LLVM may use in code for us. What else LLVM lists for a CPU are
# tuning hints, instructions of operating systems that virtual machines often hide, or cryptography,
# which is only used where code asks for it: LLVM's Cortex-A72 has AES, a Raspberry Pi 4 does not.
_EXTENSIONS = (
    "sse3 ssse3 sse4.1 sse4.2 popcnt lzcnt movbe bmi bmi2 fma f16c avx avx2 avxvnni avxvnniint8 "
    "avx512f avx512bw avx512cd avx512dq avx512vl avx512ifma avx512vbmi avx512vbmi2 avx512vnni "
    "avx512bitalg avx512vpopcntdq avx512bf16 avx512fp16 gfni "
    "neon dotprod fullfp16 fp16fml bf16 i8mm lse rdm crc sve sve2"
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


def _x86(level: str, *extra: str) -> dict[str, Any]:
    options: dict[str, Any] = {"kind": "llvm", "mcpu": f"x86-64-{level}"}
    if extra:
        options["mattr"] = list(extra)
    return options


def _arm(cpu: str, cores: int, *extra: str, system: str = "linux-gnu") -> dict[str, Any]:
    options: dict[str, Any] = {
        "kind": "llvm",
        "mtriple": f"aarch64-{system}",
        "mcpu": cpu,
        "num-cores": cores,
    }
    if extra:
        options["mattr"] = list(extra)
    return options


ROWS = (
    TargetRow("llvm", "cpu", "tile16x32", "this machine's CPU"),
    TargetRow("cuda", "cuda", "cuda-fragment", "this machine's GPU"),
    TargetRow(
        "x86-64-v4+vnni",
        "cpu",
        "tile16x32",
        "AVX-512 VNNI, VBMI and BF16, as Zen 4 and later have: SmolLM2-135M ran",
        _x86("v4", "+avx512vnni", "+avx512vbmi", "+avx512bf16"),
    ),
    TargetRow("x86-64-v4", "cpu", "tile16x32", "AVX-512: SmolLM2-135M ran", _x86("v4")),
    TargetRow("x86-64-v3", "cpu", "tile16x32", "AVX2: SmolLM2-135M ran", _x86("v3")),
    TargetRow("x86-64-v2", "cpu", "tile16x32", "SSE4.2: SmolLM2-135M ran", _x86("v2")),
    TargetRow(
        "raspberry-pi/4b-aarch64",
        "cpu",
        "tile16x32",
        "Cortex-A72: SmolLM2-135M ran under qemu-user with the text of x86-64; no board",
        _arm("cortex-a72", 4, "+neon"),
    ),
    TargetRow(
        "raspberry-pi/5-aarch64",
        "cpu",
        "tile16x32",
        "Cortex-A76 with dot product: SmolLM2-135M ran under qemu-user, dot products included; "
        "no board",
        _arm("cortex-a76", 4),
    ),
    TargetRow(
        "aws/graviton2",
        "cpu",
        "tile16x32",
        "Neoverse N1: a small model ran under qemu-user; no such machine",
        _arm("neoverse-n1", 16),
    ),
    TargetRow(
        "aws/graviton3",
        "cpu",
        "tile16x32",
        "Neoverse V1, without SVE: a small model ran under qemu-user; no such machine",
        _arm("neoverse-v1", 16, "-sve"),
    ),
    TargetRow(
        "nvidia/jetson-agx-orin-64gb",
        "cuda",
        "cuda-fragment",
        "aarch64 library with an sm_87 cubin, both checked; not run. PyPI's CUDA runtime of TVM "
        "needs CUDA 13 on the board",
        {**_arm("cortex-a78", 12), "arch": "sm_87"},
    ),
    TargetRow(
        "android-aarch64",
        "cpu",
        "tile16x32",
        "object files (--no-link), or linked by the NDK's compiler in TVM_NDK_CC; not linked here, "
        "not run",
        _arm("cortex-a76", 4, system="linux-android24"),
    ),
    TargetRow(
        "riscv64-linux",
        "cpu",
        "tile16x32",
        "object files (--no-link), or linked by Debian's cross compiler; PyPI has no TVM runtime "
        "for it; not run",
        {
            "kind": "llvm",
            "mtriple": "riscv64-linux-gnu",
            "mcpu": "generic-rv64",
            "mattr": ["+m", "+a", "+f", "+d", "+c"],
            "mabi": "lp64d",
            "num-cores": 4,
        },
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
    gpu : str
        What the driver calls the GPU that is meant, "" where only its architecture is known.
    """

    tvm: Any
    key: str
    device: str
    layout: str
    features: tuple[str, ...]
    triple: str
    gpu: str = ""

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
        return _cuda(detail or None)
    if kind == "llvm":
        return _cpu(host_options() if not detail else _named_cpu(detail))
    for row in ROWS:
        if row.name == name:
            return _board(row)
    if "/" not in name:  # TVM's tags have one: TVM, a second to import, need not be asked
        raise _unknown(name)
    from tvm.target import Target

    try:
        target = Target(name)
    except Exception as error:
        raise _unknown(name) from error
    if target.kind.name != "llvm":
        raise TargetError(
            f"target {name!r} is of kind {target.kind.name}; artifacts are made for llvm and cuda"
        )
    return _cpu({}, target)


def _unknown(name: str) -> TargetError:
    known = [row.name for row in ROWS]
    near = get_close_matches(name, known, 1)
    return TargetError(
        f"unknown target {name!r}{f', did you mean {near[0]!r}?' if near else ''}; known are llvm, "
        f"llvm:CPU, cuda, cuda:sm_NN, {', '.join(row.name for row in ROWS if row.options)} and "
        "TVM's tags of llvm targets"
    )


def _cuda(name: str | None, layout: str = "cuda-fragment", host: Any = None) -> ResolvedTarget:
    """Return the target of a GPU; with a host, a board's: machine code for both, cross-linked."""
    from amx_tvm.targets.cuda.driver import gpus_here
    from amx_tvm.targets.cuda.gpus import gpu, named
    from amx_tvm.targets.cuda.target import architectures_of, name_of, target
    from amx_tvm.targets.cuda.toolchain import enable

    meant = named(name) if name is not None else None
    if meant is not None:
        usual = gpu(meant.arch).multiprocessors == meant.multiprocessors
        name = meant.arch if usual else f"{meant.arch}/{meant.multiprocessors}"
    made = target(name, host)
    called = [g.name for g in ([meant] if meant else gpus_here() if name is None else [])]
    enable()
    triple = str(host["mtriple"]) if host else ""
    return ResolvedTarget(
        made,
        f"cuda/{name_of(made)}",
        "cuda",
        layout,
        architectures_of(made),
        triple,
        called[0] if called else "",
    )


def _board(row: TargetRow) -> ResolvedTarget:
    options = dict(row.options)
    if row.device == "cpu":
        return _cpu(options)
    return _cuda(str(options.pop("arch")), row.layout, options)


def host_options() -> dict[str, Any]:
    """Return TVM's options of this CPU: LLVM's name, without what the machine hides.

    `amx_tvm.artifact.cpu` says how ``AMX_TVM_CPU`` puts an older CPU in its place.
    """
    from tvm.target import Target, codegen

    cpu = limit() or str(codegen.llvm_get_system_cpu())
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
            "x86-64-v4, znver4, icelake-server. Other architectures have names such as "
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
