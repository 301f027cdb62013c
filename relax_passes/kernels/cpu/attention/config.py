"""What a KV cache has to hold and how it is laid out.

Page layout.  The runtime allocates per layer one array of logical shape
``[pages, 2, kv_heads, page_size, head_dim]`` (K at index 0, V at 1) and never looks inside; only
the kernels of this package do.  Inside the block of one page and head:

    V   [page_size][head_dim]             one token after the other
    K   [page_size / 16][head_dim][16]    panels of 16 tokens, transposed

so that the scores of 16 keys are one vector, each K vector is loaded once for all query heads of
its group, and no dot product ends in a horizontal sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from amx_tvm.errors import ModelError
from relax_passes.attention_spec import AttentionSpec, Rotation, one_rotation

PANEL = 16  # tokens of one transposed K panel
PAGE_SIZE = 64  # tokens of one page: decode reads whole pages, and long streams are faster


def stored_channels(head_dim: int) -> int:
    """Channels of a head in the cache: kernels take multiples of 16, the rest are zeros."""
    return -(-head_dim // 16) * 16


@dataclass(frozen=True)
class KVCacheConfig:
    """The attention of all layers of a model, and how its keys and values are stored.

    Parameters
    ----------
    specs : tuple of AttentionSpec
        One for each layer; only windows and rotations may differ.
    dtype : str
        Element type of the cache: "float32", or "float16" for half the memory and bandwidth.
    quantize : str
        4-bit format of queries, keys, attention weights and values (see :mod:`.quantized`); "" for
        none. The cache is then float32 and no layer slides.
    page_size : int
        Tokens of a page, a multiple of 16.
    """

    specs: tuple[AttentionSpec, ...]
    dtype: str = "float32"
    quantize: str = ""
    page_size: int = PAGE_SIZE

    def __post_init__(self) -> None:
        spec = self.specs[0]
        if spec.heads % spec.kv_heads:
            raise ModelError(
                f"{spec.heads} attention heads cannot share {spec.kv_heads} key/value "
                "heads: expected a multiple; check num_attention_heads and num_key_value_heads"
            )
        if spec.sinks and spec.head_dim % 16:
            raise ModelError(
                f"head_dim {spec.head_dim} of a model with attention sinks is not supported: "
                "expected a multiple of 16"
            )
        if self.dtype not in ("float32", "float16"):
            raise ModelError(f"KV cache type {self.dtype!r}: expected 'float32' or 'float16'")
        if self.page_size % PANEL or self.page_size <= 0:
            raise ModelError(f"KV cache page size {self.page_size}: expected a multiple of {PANEL}")
        if self.quantize and self.page_size % 32:
            raise ModelError(f"KV cache page size {self.page_size}: expected a multiple of 32")
        if self.quantize and (self.window or self.dtype != "float32"):
            raise ModelError(
                f"attention quantized to {self.quantize} has kernels for a float32 cache without "
                "sliding layers only; compile this model without quantized attention"
            )
        if self.lse_heads and (self.quantize or 2 * spec.group > self.head_dim):
            raise ModelError(
                f"attention sinks need unquantized attention and head_dim {self.head_dim} of at "
                f"least twice the {spec.group} query heads of a group"
            )
        for other in self.specs:
            if other.rotation.channels > spec.head_dim:
                raise ModelError(
                    f"rotary_dim {other.rotation.channels} is not supported: expected an even "
                    f"number up to head_dim {spec.head_dim}"
                )
            if other.window not in (0, self.window) or other != replace(
                spec,
                layer=other.layer,
                window=other.window,
                rotation=other.rotation,
                long_rotation=other.long_rotation,
            ):
                raise ModelError(
                    f"attention of layer {other.layer} is {other}, of layer {spec.layer} {spec}: "
                    "only windows, of one length, and rotary embeddings may differ"
                )

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.specs)

    @property
    def lse_heads(self) -> bool:
        """Whether each group has one more query head that does not attend.

        Its output is the log2-sum-exp of the scores of the others, channel g for head g and channel
        group - 1 + g for what rounding to the cache's type lost: the runtime's object hands out
        nothing but the heads' outputs, and sinks need it (`sinks`).
        """
        return self.specs[0].sinks

    @property
    def num_heads(self) -> int:
        """Query heads, those of `lse_heads` included."""
        return self.specs[0].heads + (self.num_kv_heads if self.lse_heads else 0)

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads."""
        return self.specs[0].kv_heads

    @property
    def head_dim(self) -> int:
        """Channels of a head in the cache."""
        return stored_channels(self.specs[0].head_dim)

    @property
    def group(self) -> int:
        """Query heads that share one key/value head, that of `lse_heads` included."""
        return self.num_heads // self.num_kv_heads

    @property
    def rotation(self) -> Rotation:
        """What the cache turns queries and keys by; nothing where layers differ."""
        return self.specs[0].rotation if one_rotation(self.specs) else Rotation()

    @property
    def soft_cap(self) -> float:
        """Bound c of c tanh(s / c) on scaled scores; 0 leaves them as they are."""
        return self.specs[0].soft_cap

    @property
    def window(self) -> int:
        """Keys that a query of a sliding layer sees, or 0 where no layer slides."""
        return max(spec.window for spec in self.specs)

    @property
    def block(self) -> int:
        """Elements of one page of one head's K or V."""
        return self.page_size * self.head_dim
