"""The paged KV cache of CPU targets and its attention kernels, in TensorIR."""

from .cache import kernels
from .config import PAGE_SIZE, KVCacheConfig
from .vector import VectorTarget

__all__ = ["PAGE_SIZE", "KVCacheConfig", "VectorTarget", "kernels"]
