"""A measuring process for the GPU of this machine: builds a candidate and times it.

    python -m tuning.gpu_worker LOCK

It answers the requests of worker.py, as package_worker.py measures. Building takes a second or two
of a core and measuring a tenth of that, so several of these work at a time and the lock lets one of
them have the GPU. It needs PyTorch with CUDA and what compiling for the GPU needs.
"""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path
from typing import Any

from tuning.oracle import FragmentOperands
from tuning.package_worker import GpuBench
from tuning.worker import Server, compiled, serve


class GpuServer(Server):
    """Builds and measures points of CUDA kernels."""

    def __init__(self, lock: Path):
        super().__init__()
        self._lock = lock.open("w")

    def warm(self) -> dict[str, Any]:
        """Load PyTorch and the compiler; returns the GPU's name."""
        import torch  # first: it brings the CUDA runtime library that TVM's needs

        super().warm()
        return {"host": {"gpu": torch.cuda.get_device_name()}}

    def prepare(self, request: dict[str, Any]) -> None:
        """Make ready for a specification."""
        from amx_tvm.targets import resolve

        self.target, (self._rows,) = resolve(request["target"]).tvm, request["rows"]
        operands = FragmentOperands(self.spec)
        with self:
            self.bench = GpuBench(operands, request["rows"])

    def build(self, contender: dict[str, Any]) -> Any:
        """Build a point."""
        return compiled(self.spec, self.target, contender, self._rows)["f"]

    def contend(self, kernels: list[Any], repeats: int) -> dict[str, Any]:
        """Check and time built kernels, alone on the GPU."""
        with self:
            return super().contend(kernels, repeats)

    def __enter__(self) -> GpuServer:
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(self, *exception: object) -> None:
        fcntl.flock(self._lock, fcntl.LOCK_UN)


if __name__ == "__main__":
    serve(GpuServer(Path(sys.argv[1])))
