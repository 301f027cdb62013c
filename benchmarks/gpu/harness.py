"""Loading kernels without a compiler, making weights on the GPU, and timing with CUDA graphs.

Weights are random packed bytes: every code is legal and scales are drawn from a realistic range, so
that nothing has to be quantized on the benchmark machine; the dense product they are checked
against comes from unpacking the very same bytes. Timing replays a graph that walks copies of the
weights, more than 256 MB together, so that they come from device memory and not from the L2 cache.
A large product runs at two speeds: for some 30 ms at the full clock, then as fast as the power
limit lets it, 10 to 15 % slower; `Times` has both.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

L2_FACTOR_BYTES = 256 << 20
_PAUSE_S = 0.4
_BURST_MS = (2.0, 15.0)


def load_runtime(folder: str | None) -> None:
    """Load TVM's runtime and its CUDA part from a folder, or from the installed package."""
    if folder is None:
        import tvm  # noqa: F401  loads both

        return
    import tvm_ffi  # noqa: F401  its library first

    for name in ("libtvm_runtime.so", "libtvm_runtime_cuda.so"):
        ctypes.CDLL(str(Path(folder) / name), ctypes.RTLD_GLOBAL)


def load_function(path: Path, name: str = "main"):  # noqa: ANN201
    """Return a kernel's function of a library."""
    import tvm_ffi

    return tvm_ffi.load_module(os.fspath(path.resolve()))[name]


def copies(nbytes: int) -> int:
    """How many weights of so many bytes exceed the L2 cache together."""
    return max(1, -(-L2_FACTOR_BYTES // nbytes))


def random_weights(n: int, k: int, copies: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random AMXFP4 weights in layout cuda-fragment: codes and scales, `copies` times each."""
    generator = torch.Generator("cuda").manual_seed(seed)
    tiles, units = -(-n // 16), -(-k // 64)
    codes = torch.randint(
        0, 256, (tiles, units, 512), dtype=torch.uint8, device="cuda", generator=generator
    )
    # E5M2 bytes 0x18..0x27: 2^-9 .. 2^-6 * 1.75
    scales = torch.randint(
        0x18, 0x28, (tiles, units, 64), dtype=torch.uint8, device="cuda", generator=generator
    )
    repeat = (copies, 1, 1, 1)
    return codes[None].repeat(repeat), scales[None].repeat(repeat)


def unpack(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dense float32 [N, K] of one AMXFP4 weight, from the layout's picture, not its packer."""
    tiles, units, _ = codes.shape
    words = codes.view(torch.int32).view(tiles, units, 8, 4, 4)  # g t step
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=codes.device)
    dense = torch.empty(tiles, 2, 8, units, 4, 2, 4, 2, device=codes.device)  # h g unit step kh t e
    pairs = scales.view(tiles, units, 8, 2, 2, 2).to(torch.int16) << 8  # g group h sign
    values = pairs.view(torch.float16).float()
    for kh in range(2):
        for h in range(2):
            i = 2 * kh + h
            for e in range(2):
                magnitude = grid[((words >> (16 * e + 9 - 3 * i)) & 7).long()]
                negative = ((words >> (16 * e + 15 - i)) & 1).bool()
                by_group = values[:, :, :, :, h].repeat_interleave(2, dim=3)  # step -> group
                scale = torch.where(
                    negative, -by_group[:, :, :, None, :, 1], by_group[:, :, :, None, :, 0]
                )
                # tiles units g t step -> tiles g units step t
                dense[:, h, :, :, :, kh, :, e] = (magnitude * scale).permute(0, 2, 1, 4, 3)
    return dense.view(tiles * 16, units * 64)


@dataclass(frozen=True)
class Times:
    """Median microseconds of one launch.

    sustained : behind 50 ms of warm-up, over 100 ms; large products meet the power limit there
    burst : from the third to the fifteenth millisecond after a pause, at the clock before that
        limit; NaN where a replay takes longer or it was not asked for
    """

    sustained: float
    burst: float

    def named(self) -> dict[str, float]:
        """The times that there are, as results have them: "us" and perhaps "us_burst"."""
        found = {"us": self.sustained, "us_burst": self.burst}
        return {name: us for name, us in found.items() if not math.isnan(us)}


def graph_time(launch, count: int, burst: bool = False, budget_ms: float = 100.0) -> Times:
    """Time a launch with replays of a graph of `count` launches."""
    import tvm_ffi

    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with tvm_ffi.use_torch_stream(torch.cuda.graph(graph)):
        for i in range(count):
            launch(i)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    at_once: list[float] = []
    if burst:
        time.sleep(_PAUSE_S)
        elapsed = 0.0
        while elapsed < _BURST_MS[1]:
            took = replay()
            if elapsed >= _BURST_MS[0]:
                at_once.append(took)
            elapsed += took
    # The clock rises for tens of milliseconds after a pause; a decode kernel's graph takes 0.2.
    spent = 0.0
    while spent < budget_ms / 2:
        spent += replay()
    times: list[float] = []
    spent = 0.0
    while len(times) < 5 or (spent < budget_ms and len(times) < 300):
        times.append(replay())
        spent += times[-1]

    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2] * 1000 / count if values else math.nan

    return Times(median(times), median(at_once))
