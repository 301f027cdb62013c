"""A measuring process for a package's libraries, on the machine with the GPU.

    python -m tuning.package_worker FOLDER [RUNTIME]

It answers the requests of worker.py; a contender is {"library": NAME}. It needs PyTorch, tvm_ffi
and TVM's runtime, from an installed amx_tvm or from the folder RUNTIME, and no compiler.

Timing: in a turn each contender replays a CUDA graph that launches its kernel once for every copy
of the weights, more than 256 MB together, so that they come from device memory and not from the L2
cache. A kernel that crashes takes this process's CUDA context along, so its error is raised.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tuning.oracle import FragmentOperands
from tuning.worker import Bench, Refused, Server, copies_of, serve, turns

COPIES_BYTES = 256 << 20
WARM_SECONDS = 0.05


class GpuBench(Bench):
    """Operands on the GPU, and the graphs of kernels."""

    def __init__(self, operands: FragmentOperands, rows: Sequence[int]):
        import torch

        self.torch, self.graphs = torch, dict[int, Any]()
        super().__init__(operands, rows, max(4, copies_of(operands.weights, COPIES_BYTES)))

    def send(self, array: np.ndarray) -> Any:
        """Copy an array to the GPU."""
        return self.torch.from_numpy(array).cuda()

    def receive(self, tensor: Any) -> np.ndarray:
        """Copy a result back."""
        self.torch.cuda.synchronize()
        return tensor.cpu().numpy()

    def error(self, kernel: Any) -> tuple[float, float]:
        """Compare a kernel with NumPy; see ``Bench``."""
        try:
            return super().error(kernel)
        except RuntimeError as error:
            if "illegal" in str(error) or "unspecified" in str(error):
                raise
            raise Refused(str(error)[-300:]) from error

    def contend(self, kernels: Sequence[Any], repeats: int) -> dict[str, Any]:
        """Compare and time kernels, at the clock that the GPU takes under load."""
        self.graphs = {}
        answer = super().contend(kernels, 0)
        if answer["state"] == "ok" and repeats:
            start = time.perf_counter()
            while time.perf_counter() - start < WARM_SECONDS:
                self.seconds(kernels[0])
            answer["times"] = turns(kernels, self.seconds, repeats)
        return answer

    def seconds(self, kernel: Any) -> float:
        """Return the seconds of one launch, over one replay."""
        if id(kernel) not in self.graphs:  # kernels outlive their graphs
            self.graphs[id(kernel)] = self._graph(kernel)
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graphs[id(kernel)].replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / len(self.weights)

    def _graph(self, kernel: Any) -> Any:
        """Capture one launch for every copy of the weights."""
        import tvm_ffi

        graph = self.torch.cuda.CUDAGraph()
        with tvm_ffi.use_torch_stream(self.torch.cuda.graph(graph)):
            for before, behind, y, _ in self.cases:
                for weights in self.weights:
                    kernel(*before, *weights, *behind, y)
        return graph


class PackageServer(Server):
    """Answers requests with libraries of a package."""

    def __init__(self, folder: Path, runtime: Path | None):
        super().__init__()
        self.folder, self.runtime = folder, runtime

    def warm(self) -> dict[str, Any]:
        """Load PyTorch and TVM's runtime; returns the GPU's name."""
        import torch  # first: it brings the CUDA runtime library that TVM's needs

        load_runtime(self.runtime)
        return {"host": {"gpu": torch.cuda.get_device_name()}}

    def prepare(self, request: dict[str, Any]) -> None:
        """Make ready for a specification."""
        self.bench = GpuBench(FragmentOperands(self.spec), request["rows"])

    def build(self, contender: dict[str, Any]) -> Any:
        """Load a library's function."""
        import tvm_ffi

        return tvm_ffi.load_module(str((self.folder / contender["library"]).resolve()))["f"]


def load_runtime(folder: Path | None) -> None:
    """Load TVM's runtime and its CUDA part from a folder, or as an installed amx_tvm does."""
    if folder is None:
        from amx_tvm.runtime.library import load_runtime as load

        load("cuda")
        return
    import tvm_ffi  # noqa: F401 - its library comes first

    for name in ("libtvm_runtime.so", "libtvm_runtime_cuda.so"):
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    serve(PackageServer(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
