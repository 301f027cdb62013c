"""`amx-tvm devices`: the CPU and GPUs here, and the names of targets.

Nothing is compiled and TVM is not imported: the CPU speaks through /proc and /sys, GPUs through
the driver library.
"""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amx_tvm.artifact.cpu import cpu_features, normalize
from amx_tvm.runtime.library import physical_cores
from amx_tvm.targets import ROWS
from amx_tvm.targets.cuda.driver import gpus_here

# What decides which CPU kernels can be used, with the names that people know.
_KERNEL_FEATURES = {
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512",
    "avx512vnni": "AVX-512 VNNI",
    "avx512vbmi": "AVX-512 VBMI",
    "avx512bf16": "AVX-512 BF16",
    "avxvnni": "AVX-VNNI",
    "amxtile": "AMX tiles",
    "neon": "NEON",
    "dotprod": "dot product",
    "i8mm": "int8 matrix",
    "sve": "SVE",
}


def run(as_json: bool) -> None:
    """Print the devices of this machine as text, or as JSON."""
    cpu, gpus = describe_cpu(), describe_gpus()
    if as_json:
        rows = [{"name": row.name, "device": row.device, "about": row.state} for row in ROWS]
        print(json.dumps({"cpu": cpu, "gpus": gpus, "targets": rows}, indent=1))
        return
    print(f"CPU   {cpu['name']} ({cpu['architecture']})")
    print(f"      {cpu['cores']} cores for TVM of {cpu['logical']} logical, ", end="")
    print(f"{cpu['memory'] / 2**30:.1f} GiB memory")
    if cpu["features"]:
        print(f"      {', '.join(cpu['features'])}")
    print("      --target llvm")
    for gpu in gpus:
        print(f"GPU   {gpu['index']}: {gpu['name']}, {gpu['memory'] / 2**30:.1f} GiB")
        print(f"      compute capability {gpu['capability']}, ", end="")
        print(f"{gpu['multiprocessors']} multiprocessors")
        print("      --target cuda")
    if not gpus:
        print("GPU   none that CUDA sees")
    print("Other machines")
    others = [(row.name, row.state) for row in ROWS if row.options]
    others += [
        ("llvm:CPU", "a CPU that LLVM knows by name"),
        ("cuda:sm_NN", "an NVIDIA GPU of that compute capability"),
    ]
    for name, state in others:
        print(f"      --target {name:<{max(len(name) for name, _ in others)}}  {state}")


def describe_cpu() -> dict[str, Any]:
    """Return name, architecture, cores, memory in bytes and the features that kernels use."""
    text = ""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        pass
    name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = 0
    present = cpu_features()
    return {
        "name": name.group(1).strip() if name else platform.processor() or "unknown",
        "architecture": platform.machine(),
        "cores": physical_cores(),
        "logical": os.cpu_count(),
        "memory": memory,
        "features": [text for key, text in _KERNEL_FEATURES.items() if normalize(key) in present],
    }


def describe_gpus() -> list[dict[str, Any]]:
    """Return the GPUs that the NVIDIA driver lists; empty without a driver."""
    return [asdict(gpu) for gpu in gpus_here()]
