"""The block types that are read, under this module's older name, which scripts import."""

from amx_tvm.frontends.gguf.types import SUPPORTED

__all__ = ["SUPPORTED"]
