# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""Loads, copies and stores: device memory, shared memory, and what ldmatrix brings to registers.

In a meaning, memory is an array of bytes, and addresses are places in it.
"""

from __future__ import annotations

import numpy as np

from .base import Intrinsic


def _words(memory: np.ndarray, address: np.ndarray, count: int) -> np.ndarray:
    """`count` 32-bit words from each address on, [..., count]."""
    place = np.asarray(address)[..., None] + np.arange(4 * count)
    return np.ascontiguousarray(memory.view(np.uint8)[place]).view(np.uint32)


def _load(name: str, instruction: str, count: int, address: str, memory: str = "") -> Intrinsic:
    """Load 1, 2 or 4 words to registers d[0..] with an instruction, "ld.shared" or so."""
    vector, places = f".v{count}" if count > 1 else "", ", ".join(f"%{i}" for i in range(count))
    outs = ", ".join(f'"=r"(d[{i}])' for i in range(count))
    places = f"{{{places}}}" if count > 1 else places
    kind = "l" if "*" in address else "r"
    text = f'  asm volatile("{instruction}{vector}.u32 {places}, [%{count}];" : {outs} : "{kind}"(a){memory});'
    return Intrinsic(
        f"{name}{count}",
        text,
        signature=f"void(unsigned* d, {address} a)",
        meaning=lambda memory, address: _words(memory, address, count),
    )


_CLOBBER = ' : "memory"'

# Weights are read once: 16 bytes a lane keep out of L1.
LOAD_WEIGHTS = {
    1: _load("amx_ldg_words", "ld.global.nc", 1, "const void*"),
    2: _load("amx_ldg_words", "ld.global.nc", 2, "const void*"),
    4: _load("amx_ldg_words", "ld.global.nc.L1::no_allocate", 4, "const void*"),
}
LOAD_SHARED = {n: _load("amx_lds", "ld.shared", n, "unsigned", _CLOBBER) for n in (1, 2, 4)}

STORE_SHARED = Intrinsic(
    "amx_sts1",
    '  asm volatile("st.shared.f32 [%0], %1;" :: "r"(a), "f"(v) : "memory");',
    signature="void(unsigned a, float v)",
)

SHARED_ADDRESS = Intrinsic(
    "amx_smem",
    "  return (unsigned)__cvta_generic_to_shared(p);",
    signature="unsigned(const void* p)",
)


def _copy16(cache: str) -> Intrinsic:
    return Intrinsic(
        f"amx_copy16_{cache}",
        f'  asm volatile("cp.async.{cache}.shared.global [%0], [%1], 16, %2;" :: "r"(dst), "l"(src), "r"(inside ? 16 : 0) : "memory");',
        signature="void(unsigned dst, const void* src, bool inside)",
        meaning=lambda memory, src, inside: np.where(
            np.asarray(inside)[..., None], _words(memory, src, 4), np.uint32(0)
        ),
    )


# 16 bytes to shared memory, zeros where `inside` is false. COPY16 passes L1 by; COPY16_L1 keeps
# them there for the other blocks of the multiprocessor.
COPY16, COPY16_L1 = _copy16("cg"), _copy16("ca")
# Have a line come to the L2 cache.
PREFETCH = Intrinsic(
    "amx_prefetch",
    '  asm volatile("prefetch.global.L2 [%0];" :: "l"(p));',
    signature="void(const void* p)",
)
COPY_COMMIT = Intrinsic("amx_copy_commit", '  asm volatile("cp.async.commit_group;" ::: "memory");')
# All of this lane's groups but the last N are there.
COPY_WAIT = Intrinsic(
    "amx_copy_wait",
    '  asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");',
    template="int N",
)


def _matrices(memory: np.ndarray, address: np.ndarray, count: int) -> np.ndarray:
    """Registers [32, count]: lane (g, t) has the halves 2t, 2t + 1 of row g of every matrix.

    Lane i's address is that of row i % 8 of matrix i / 8; a row is 16 bytes.
    """
    rows = _words(memory, np.asarray(address)[: 8 * count], 4)  # [8 count, 4]
    return rows.reshape(count, 8, 4).transpose(1, 2, 0).reshape(32, count)


def _turned(memory: np.ndarray, address: np.ndarray, count: int) -> np.ndarray:
    """Registers [32, count]: lane (g, t) has the halves of column g of rows 2t, 2t + 1."""
    rows = _words(memory, np.asarray(address)[: 8 * count], 4).view(np.uint16)  # [8 count, 8]
    columns = rows.reshape(count, 8, 8).transpose(0, 2, 1)
    return np.ascontiguousarray(columns).view(np.uint32).transpose(1, 2, 0).reshape(32, count)


def _matrix(count: int, turned: bool = False) -> Intrinsic:
    places = ", ".join(f"%{i}" for i in range(count))
    outs = ", ".join(f'"=r"(d[{i}])' for i in range(count))
    kind, found = (".trans", _turned) if turned else ("", _matrices)
    return Intrinsic(
        f"amx_matrix{'_turned' * turned}{count}",
        f'  asm volatile("ldmatrix.sync.aligned.m8n8.x{count}{kind}.shared.b16 {{{places}}}, [%{count}];" : {outs} : "r"(a) : "memory");',
        signature="void(unsigned* d, unsigned a)",
        meaning=lambda memory, address: found(memory, address, count),
    )


# Registers of the x operand: matrices of 8 columns x 16 bytes, one row's address a lane.
MATRIX = {n: _matrix(n) for n in (2, 4)}
# Four matrices, of which a lane gets columns: rows are then the products' long side.
MATRIX_TURNED = _matrix(4, turned=True)
