"""Model families: configurations and Relax modules for what frontends load."""

from amx_tvm.models import llama  # noqa: F401 - registers itself
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.registry import ModelFamily, families, find, register

__all__ = ["DecoderConfig", "ModelFamily", "families", "find", "register"]
