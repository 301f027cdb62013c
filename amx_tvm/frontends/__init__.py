"""Model frontends: whatever the user has becomes a configuration and a stream of named weights.

``open_model`` recognizes a Hugging Face directory, a GGUF file, a hub id or a file inside an
installed package; ``importers`` wraps modules of torch, ONNX, StableHLO and Relax.
Everything that can be wrong with the files is found when they are opened, before any work.
"""

from amx_tvm.frontends.base import ModelSource
from amx_tvm.frontends.open import open_model

__all__ = ["ModelSource", "open_model"]
