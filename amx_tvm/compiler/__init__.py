"""The compiler driver: opens a model, runs the passes, streams parameters, writes the artifact."""

import amx_tvm.own_packages  # noqa: F401 - it looks for files in the way
from amx_tvm.compiler.compile import Artifact, compile
from amx_tvm.compiler.weights import Overrides

__all__ = ["Artifact", "Overrides", "compile"]
