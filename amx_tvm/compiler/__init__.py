"""The compiler driver: opens a model, runs the passes, streams parameters, writes the artifact."""

from amx_tvm.compiler.compile import Artifact, compile
from amx_tvm.compiler.weights import Overrides

__all__ = ["Artifact", "Overrides", "compile"]
