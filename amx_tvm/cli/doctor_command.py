"""`amx-tvm doctor`: what this machine has, what that enables, and the line that installs the rest.

Nothing is compiled and TVM is not imported.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from amx_tvm.cli.devices_command import describe_cpu, describe_gpus
from amx_tvm.errors import TargetError
from amx_tvm.extras import install
from amx_tvm.linker import linker
from amx_tvm.targets.cuda.toolchain import compiler_problem, find_nvcc
from amx_tvm.version import TVM, TVM_FFI

SYSTEMS = ("Linux",)  # where the suite runs
PYTHON = (3, 10)
MARKS = {True: "yes", False: "no", None: "--"}

# Extra -> a module that it brings, and what it is for.
EXTRAS = {
    "hub": ("huggingface_hub", "compiling a model by its hub id"),
    "serve": ("starlette", "amx-tvm serve"),
    "images": ("PIL", "images in prompts"),
    "torch": ("torch", "compiling torch modules, calibration"),
    "tune": ("xgboost", "amx-tvm tune"),
    "onnx": ("onnx", "compiling ONNX files"),
    "stablehlo": ("jax", "compiling StableHLO modules"),
    "sign": ("cryptography", "signing artifacts and requiring signatures"),
    "plot": ("matplotlib", "plots of eval and bench"),
    "tasks": ("lm_eval", "amx-tvm eval --tasks"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes
    ----------
    name, found : str
        What, and what is here.
    fine : bool or None
        Whether it is right; None where it is missing and few need it.
    enables, remedy : str
        What it is for, and what to do where it is not right.
    """

    name: str
    found: str
    fine: bool | None
    enables: str
    remedy: str = ""


def run(as_json: bool) -> int:
    """Print what was found; return 1 where something is wrong that compiling or running needs."""
    findings = list(look())
    wrong = any(finding.fine is False for finding in findings)
    if as_json:
        print(json.dumps({"fine": not wrong, "findings": [asdict(f) for f in findings]}, indent=1))
        return int(wrong)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{MARKS[finding.fine]:<4}{finding.name:<{width}}  {finding.found}")
        if finding.fine is not True:
            print(f"{'':<{width + 6}}for {finding.enables}")
            print(f"{'':<{width + 6}}{finding.remedy}")
    return int(wrong)


def look() -> Iterator[Finding]:
    """Look for everything; what all need comes first."""
    yield from _platform()
    yield from _packages()
    yield _compiler()
    yield from _gpu()
    yield from _extras()


def _platform() -> Iterator[Finding]:
    system, here = platform.system(), platform.python_version()
    yield Finding(
        "system",
        f"{system} {platform.machine()}",
        system in SYSTEMS,
        "everything",
        f"supported is {', '.join(SYSTEMS)}; on Windows use WSL 2, elsewhere a container",
    )
    yield Finding(
        "Python",
        here,
        sys.version_info >= PYTHON,
        "everything",
        f"install Python {PYTHON[0]}.{PYTHON[1]} or later",
    )
    cpu = describe_cpu()
    features = ", ".join(cpu["features"])
    yield Finding(
        "CPU",
        f"{cpu['name']}, {cpu['cores']} cores, {cpu['memory'] / 2**30:.1f} GiB; {features}",
        True if features else None,
        "the quick kernels, which need AVX2, NEON or better",
        "models run with plain vector code",
    )


def _packages() -> Iterator[Finding]:
    for package, wanted in (("apache-tvm", TVM), ("apache-tvm-ffi", TVM_FFI)):
        found = _version(package)
        yield Finding(
            package,
            found or "missing",
            found == wanted,
            "compiling and running",
            f"pip install {package}=={wanted}",
        )


def _compiler() -> Finding:
    needed_for = "compiling (running an artifact needs none)"
    try:
        return Finding("C compiler", str(linker("")), True, needed_for)
    except TargetError as problem:
        return Finding("C compiler", "missing", False, needed_for, str(problem))


def _gpu() -> Iterator[Finding]:
    gpus = describe_gpus()
    names = ", ".join(f"{gpu['name']} (sm_{gpu['capability'].replace('.', '')})" for gpu in gpus)
    yield Finding(
        "GPU",
        names or "none that CUDA sees",
        True if gpus else None,
        "running on a GPU",
        "a GPU of NVIDIA's with compute capability 8.0 or later, and its driver",
    )
    nvcc, problem = find_nvcc(), compiler_problem()
    yield Finding(
        "nvcc",
        problem if nvcc and problem else nvcc or "missing",
        None if problem else True,
        "compiling for a GPU, here or for another machine",
        install("cuda"),
    )


def _extras() -> Iterator[Finding]:
    for extra, (module, use) in EXTRAS.items():
        there = find_spec(module) is not None
        yield Finding(
            f"[{extra}]",
            module if there else "missing",
            True if there else None,
            use,
            install(extra),
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
