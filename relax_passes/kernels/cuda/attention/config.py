"""What the attention kernels of a model are made for."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from amx_tvm.errors import ModelError
from relax_passes.attention_spec import AttentionSpec, Rotation
from relax_passes.kernels.cuda.intrinsics.base import Source

PAGE_TOKENS = 16
TOKEN = 4  # float16 numbers of the cache object's own heads: as many as an address needs
MOST_SEQUENCES = 256  # of a step in which each has one row
MOST_CHANNELS = 256  # of a head
MOST_GROUP = 64  # query heads that share a kv head
ROWS = 16  # queries of a block: rows of the tensor core's operand
NORMS = ("q_norm", "k_norm")
EXTRAS = ("sinks", *NORMS)


@dataclass(frozen=True)
class Heads:
    """How the heads of a layer lie in pages and blocks.

    Parameters
    ----------
    spec : AttentionSpec
        Any layer's: heads and their size are all layers'.
    """

    spec: AttentionSpec

    @property
    def stored(self) -> int:
        """Channels of a head in pages and shared memory, the last ones zero: a multiple of 32."""
        return stored_channels(self.spec.head_dim)

    @property
    def parts(self) -> int:
        """Blocks that share the queries of a kv head; each stores the new token for itself."""
        group = self.spec.group
        return next(p for p in range(1, group + 1) if group % p == 0 and group // p <= ROWS)

    @property
    def group(self) -> int:
        """Query heads of a block."""
        return self.spec.group // self.parts

    @property
    def blocks(self) -> int:
        """Blocks of all kv heads."""
        return self.spec.kv_heads * self.parts

    @property
    def numbers(self) -> str:
        """Template arguments: channels stored and true, queries, kv heads, parts."""
        spec = self.spec
        return f"{self.stored}, {spec.head_dim}, {self.group}, {spec.kv_heads}, {self.parts}"

    @property
    def name(self) -> str:
        """The same in a C name."""
        return self.numbers.replace(", ", "_")


def stored_channels(head_dim: int) -> int:
    """Return the channels of a head in pages."""
    return -(-head_dim // 32) * 32


def check(spec: AttentionSpec) -> None:
    """Refuse heads that no kernel computes.

    Raises
    ------
    ModelError
        For heads that are too large, odd, or too many for a kv head.
    """
    sizes = 0 < spec.head_dim <= MOST_CHANNELS and spec.head_dim % 2 == 0
    if not sizes or spec.group > MOST_GROUP or spec.heads % spec.kv_heads:
        raise ModelError(
            f"attention of {spec.heads} heads of {spec.head_dim} channels on {spec.kv_heads} kv "
            f"heads has no kernel on GPUs: expected an even number of at most {MOST_CHANNELS} "
            f"channels and whole groups of at most {MOST_GROUP} heads; compile for a CPU"
        )


def extras(spec: AttentionSpec) -> tuple[str, ...]:
    """Return what a layer's kernels take beside its rows: sinks, weights of the heads' norms."""
    return ("sinks",) * spec.sinks + NORMS * bool(spec.norm_eps)


def declared(names: tuple[str, ...]) -> str:
    """Return them as parameters of a C function, for its signature."""
    return "".join(f"const void* {name}, " for name in names)


def passed(spec: AttentionSpec, names: tuple[str, ...]) -> str:
    """Return them as its arguments, null where a layer has none."""
    found = extras(spec)
    return ", ".join(name if name in found else "nullptr" for name in names)


def page_elements(spec: AttentionSpec, layers: int) -> int:
    """float16 numbers of a page of all layers."""
    return layers * 2 * spec.kv_heads * PAGE_TOKENS * stored_channels(spec.head_dim)


def frequencies(rotation: Rotation) -> Source:
    """Define the array of a rotation's frequencies, as a constant."""
    values = np.asarray(rotation.frequencies or (0.0,), np.float32)
    numbers = ", ".join(f"{float(v)!r}f" for v in values)
    name = f"amx_frequencies_{rotation.pairs}_{crc32(values.tobytes()):08x}"
    return Source(name, f"__device__ const float {name}[{len(values)}] = {{{numbers}}};")
