"""What the attention kernels of a model are made for."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from relax_passes.attention_spec import AttentionSpec, Rotation
from relax_passes.kernels.cuda.intrinsics.base import Source

PAGE_TOKENS = 16
TOKEN = 4  # float16 numbers of the cache object's own heads: as many as an address needs
MOST_SEQUENCES = 256  # of a step in which each has one row
HEAD_DIMS = (32, 64, 96, 128, 160, 192, 256)


def fits(spec: AttentionSpec) -> bool:
    """Whether the kernels compute this shape."""
    return spec.head_dim in HEAD_DIMS and spec.group <= 16 and not spec.sinks


def page_elements(spec: AttentionSpec, layers: int) -> int:
    """float16 numbers of a page of all layers."""
    return layers * 2 * spec.kv_heads * PAGE_TOKENS * spec.head_dim


def frequencies(rotation: Rotation) -> Source:
    """Define the array of a rotation's frequencies, as a constant."""
    values = np.asarray(rotation.frequencies or (0.0,), np.float32)
    numbers = ", ".join(f"{float(v)!r}f" for v in values)
    name = f"amx_frequencies_{rotation.pairs}_{crc32(values.tobytes()):08x}"
    return Source(name, f"__device__ const float {name}[{len(values)}] = {{{numbers}}};")
