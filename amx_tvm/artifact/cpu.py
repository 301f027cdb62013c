"""What instruction sets this CPU has, compared with what an artifact needs.

LLVM, GCC and Linux spell the same extension differently (``avx512vnni`` / ``avx512_vnni``,
``dotprod`` / ``asimddp``), so names are reduced to LLVM's spelling without ``_``, ``-``, ``.`` and
``+``. /proc/cpuinfo shows the host's CPU under user-mode emulation, so aarch64's features come from
the auxiliary vector, and x86's are those of /proc/cpuinfo (what the kernel lets programs use) that
the CPUID instruction confirms, asked through the C library.

``AMX_TVM_CPU=x86-64-v3`` makes a process take its CPU for one that has no more than that level:
"llvm" compiles for it, and artifacts that need more are refused, as on the older machine.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterable
from functools import lru_cache

from amx_tvm.errors import TargetError

VARIABLE = "AMX_TVM_CPU"

# The levels of the x86-64 psABI, version 1.0, table 3.1: name -> features.
_V2 = frozenset("cmov cx8 cx16 fxsr mmx popcnt sahf sse sse2 sse3 sse41 sse42 ssse3".split())
_V3 = _V2 | frozenset("avx avx2 bmi bmi2 f16c fma lzcnt movbe".split())
_V4 = _V3 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())
LEVELS = {"x86-64-v2": _V2, "x86-64-v3": _V3, "x86-64-v4": _V4}

# Linux's flag -> LLVM's feature, where removing punctuation is not enough.
_ALIASES = {
    "pni": "sse3",
    "abm": "lzcnt",
    "bmi1": "bmi",
    "shani": "sha",
    "rdrand": "rdrnd",
    "pclmulqdq": "pclmul",
    "3dnowprefetch": "prfchw",
    "lahflm": "sahf",
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fullfp16",
    "atomics": "lse",
    "asimdrdm": "rdm",
    "pmull": "aes",
}

# Features of LLVM that no kernel flag reports, because every CPU of the architecture has them, and
# the prefixes of those that only tune code: neither makes an artifact unloadable.
_UNREPORTED = {"64bit", "x87", "crc32", "evex512"}
_TUNING = ("fast", "slow", "false", "tuning", "use", "prefer", "idiv", "macrofusion", "branch")

# Linux arch/arm64/include/uapi/asm/hwcap.h: (auxiliary vector entry, bit) -> LLVM's feature.
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_ARM_BITS = {
    (_AT_HWCAP, 0): "fparmv8",
    (_AT_HWCAP, 1): "neon",
    (_AT_HWCAP, 3): "aes",
    (_AT_HWCAP, 6): "sha2",
    (_AT_HWCAP, 7): "crc",
    (_AT_HWCAP, 8): "lse",
    (_AT_HWCAP, 10): "fullfp16",
    (_AT_HWCAP, 12): "rdm",
    (_AT_HWCAP, 17): "sha3",
    (_AT_HWCAP, 20): "dotprod",
    (_AT_HWCAP, 22): "sve",
    (_AT_HWCAP, 23): "fp16fml",
    (_AT_HWCAP2, 1): "sve2",
    (_AT_HWCAP2, 13): "i8mm",
    (_AT_HWCAP2, 14): "bf16",
}


# CPUID bits (Intel SDM, volume 2, CPUID): (glibc's leaf, register, {bit: LLVM's feature}), where
# glibc's leaves (sys/platform/x86.h) are 0: EAX=1, 1: EAX=7, 2: EAX=80000001H, 6: EAX=7 ECX=1.
_EAX, _EBX, _ECX, _EDX = range(4)
_X86_BITS = (
    (0, _ECX, {0: "sse3", 9: "ssse3", 12: "fma", 19: "sse41", 20: "sse42", 22: "movbe"}),
    (0, _ECX, {23: "popcnt", 28: "avx", 29: "f16c"}),
    (1, _EBX, {3: "bmi", 5: "avx2", 8: "bmi2", 16: "avx512f", 17: "avx512dq", 21: "avx512ifma"}),
    (1, _EBX, {28: "avx512cd", 30: "avx512bw", 31: "avx512vl"}),
    (1, _ECX, {1: "avx512vbmi", 6: "avx512vbmi2", 8: "gfni", 11: "avx512vnni"}),
    (1, _ECX, {12: "avx512bitalg", 14: "avx512vpopcntdq"}),
    (1, _EDX, {23: "avx512fp16"}),
    (2, _ECX, {5: "lzcnt"}),
    (6, _EAX, {4: "avxvnni", 5: "avx512bf16"}),
    (6, _EDX, {4: "avxvnniint8"}),
)


def normalize(name: str) -> str:
    """Return a feature's name in the reduced spelling of this module."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return _ALIASES.get(plain, plain)


def limit() -> str:
    """Return the level that ``AMX_TVM_CPU`` limits this process to, or "".

    Raises
    ------
    TargetError
        For anything but a level of x86-64.
    """
    level = os.environ.get(VARIABLE, "")
    if level and level not in LEVELS:
        raise TargetError(
            f"{VARIABLE} is {level!r}; expected {', '.join(LEVELS)}, or nothing for this CPU"
        )
    return level


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """Return the features of the CPU that runs this process, normalized; empty if unknown.

    ``AMX_TVM_CPU`` takes away what its level does not have.
    """
    level = limit()
    found = _machine_features()
    return found & LEVELS[level] if level else found


def _machine_features() -> frozenset[str]:
    if platform.machine().lower() in ("aarch64", "arm64"):
        return _arm_features()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.split(":")[0].strip() in ("flags", "Features", "isa"):
                    flags = frozenset(map(normalize, line.split(":", 1)[1].split()))
                    return flags - _denied_by_cpuid()
    except OSError:
        pass
    return frozenset()


def _denied_by_cpuid() -> frozenset[str]:
    """Return the x86 features that CPUID denies; none where glibc (2.33) cannot be asked."""
    try:
        ask = ctypes.CDLL(None).__x86_get_cpuid_feature_leaf
    except (OSError, AttributeError):
        return frozenset()
    ask.restype, ask.argtypes = ctypes.POINTER(ctypes.c_uint * 8), [ctypes.c_uint]
    denied = set()
    for leaf, register, features in _X86_BITS:
        word = ask(leaf).contents[register]
        denied |= {feature for bit, feature in features.items() if not word >> bit & 1}
    return frozenset(denied)


def _arm_features() -> frozenset[str]:
    try:
        getauxval = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError):
        return frozenset()
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return frozenset(
        feature for (entry, bit), feature in _ARM_BITS.items() if getauxval(entry) >> bit & 1
    )


def missing_features(needed: Iterable[str], present: frozenset[str]) -> list[str]:
    """Return the features of ``needed`` that ``present`` lacks, in the artifact's spelling.

    Names with a leading ``-`` (switched off) and tuning hints are no needs. Where the machine's
    features are unknown (``present`` empty) nothing can be said and nothing is missing.
    """
    if not present:
        return []
    missing = []
    for name in needed:
        plain = normalize(name)
        if name.startswith("-") or plain in _UNREPORTED or plain.startswith(_TUNING):
            continue
        if re.fullmatch(r"v\d+a", plain):  # "v8.2a" is an architecture revision
            continue
        if plain not in present:
            missing.append(name.lstrip("+"))
    return missing
