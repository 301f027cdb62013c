"""The KV cache of CPU targets that stores keys and values in few bits, in TensorIR."""

from .layout import Layout

__all__ = ["Layout"]
