"""What the machine's arithmetic gives: operations a second of its quickest products in registers.

Unlike the memory's bandwidth this takes the compiler: the instructions are those of the kernels
that the machine's instruction set has (`relax_passes.kernels.cpu.peak`).
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SECONDS = 0.1  # that a measurement takes at least


def peak_operations(threads: int, exact: bool = False, seconds: float = SECONDS) -> float:
    """Return the multiplications and additions a second that ``threads`` cores make together.

    Parameters
    ----------
    threads : int
        Threads that compute at the same time.
    exact : bool
        Products of float32, as strict artifacts have; otherwise of bytes.
    seconds : float
        How long to compute; the best of its rounds counts.
    """
    import tvm
    from tvm.target import Target

    from amx_tvm.targets import host_options
    from relax_passes.kernels.base import TargetInfo
    from relax_passes.kernels.cpu.linear.rules import isa_of
    from relax_passes.kernels.cpu.peak import byte_products, float_products
    from relax_passes.tir_pipeline import PIPELINE

    target = Target(host_options())
    isa = isa_of(TargetInfo.of(target))
    peak = float_products(isa) if exact else byte_products(isa)
    module = tvm.IRModule({"peak": peak.func.with_attr("global_symbol", "peak")})
    call = tvm.compile(module, target, tir_pipeline=PIPELINE)["peak"]
    one = np.float32(1).tobytes()

    def buffers() -> list[tvm.runtime.Tensor]:
        """Return what a thread computes with: the bytes of ones, in float32 and as bytes alike."""
        made = []
        for shape, dtype in peak.buffers:
            repeated = one * (int(np.prod(shape)) * np.dtype(dtype).itemsize // len(one))
            made.append(tvm.runtime.tensor(np.frombuffer(repeated, dtype).reshape(shape)))
        return made

    each = [buffers() for _ in range(threads)]
    rates: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while not rates or time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(lambda own: call(*own), each))
            rates.append(threads * peak.operations / (time.perf_counter() - start))
    return max(rates)
