"""Run a compiled artifact: no compiler, no torch, only NumPy, tvm_ffi and TVM's runtime library."""

from amx_tvm.runtime.embedding import EmbeddingEngine
from amx_tvm.runtime.engine import Engine
from amx_tvm.runtime.function import FunctionEngine
from amx_tvm.runtime.generation import TextStream
from amx_tvm.runtime.loading import load
from amx_tvm.runtime.options import Limits, Sampling
from amx_tvm.runtime.request import Handle, Request
from amx_tvm.runtime.result import GenerationResult, Timings
from amx_tvm.runtime.scheduler import Scheduler
from amx_tvm.runtime.session import Sequence

__all__ = [
    "EmbeddingEngine",
    "Engine",
    "FunctionEngine",
    "GenerationResult",
    "Handle",
    "Limits",
    "Request",
    "Sampling",
    "Scheduler",
    "Sequence",
    "TextStream",
    "Timings",
    "load",
]
