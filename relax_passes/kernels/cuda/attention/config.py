"""What the attention kernels of a model are made for."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from relax_passes.attention_spec import Rotation
from relax_passes.kernels.cuda.intrinsics.base import Source

PAGE_TOKENS = 16
TOKEN = 4  # float16 numbers of the cache object's own heads: as many as an address needs
HEAD_DIMS = (32, 64, 96, 128, 160, 192, 256)


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of a model's attention and the architecture.

    Parameters
    ----------
    layers, heads, kv_heads, head_dim : int
        As in Hugging Face's configurations.
    arch : str
        Architecture, such as "sm_90a".
    soft_cap : float
        Bound c of c tanh(s / c) on scaled scores; 0 leaves them as they are.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    arch: str
    soft_cap: float = 0.0

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads

    @property
    def page_elements(self) -> int:
        """float16 numbers of a page of all layers."""
        return self.layers * 2 * self.kv_heads * PAGE_TOKENS * self.head_dim

    @property
    def fits(self) -> bool:
        """Whether the kernels compute this shape."""
        return self.head_dim in HEAD_DIMS and self.group <= 16


def frequencies(rotation: Rotation) -> Source:
    """Define the array of a rotation's frequencies, as a constant."""
    values = np.asarray(rotation.frequencies or (0.0,), np.float32)
    numbers = ", ".join(f"{float(v)!r}f" for v in values)
    name = f"amx_frequencies_{rotation.pairs}_{crc32(values.tobytes()):08x}"
    return Source(name, f"__device__ const float {name}[{len(values)}] = {{{numbers}}};")
