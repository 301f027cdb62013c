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

from dataclasses import dataclass

from amx_tvm.errors import ModelError
from relax_passes.attention_spec import Rotation

PANEL = 16  # tokens of one transposed K panel
PAGE_SIZE = 64  # tokens of one page: decode reads whole pages, and long streams are faster
ATTENTION_KINDS = ("mha", "mha_sliding")


@dataclass(frozen=True)
class KVCacheConfig:
    """Shape, rotary embedding and storage of a model's KV cache.

    Parameters
    ----------
    layers, num_heads, num_kv_heads, head_dim : int
        Decoder layers, query heads, key/value heads, channels of a head (a multiple of 16).
    rotation : Rotation
        What the cache turns queries and keys by; nothing where the model has done it.
    soft_cap : float
        Bound c of c tanh(s / c) on scaled scores; 0 leaves them as they are.
    dtype : str
        Element type of the cache: "float32", or "float16" for half the memory and bandwidth.
    sliding_window : int or None
        Keys that a query of a sliding layer sees, itself included.
    attn_kind : str or sequence of str
        "mha" or "mha_sliding", for all layers or one for each.
    page_size : int
        Tokens of a page, a multiple of 16.
    lse_heads : bool
        The last query head of each group does not attend: its output is the log2-sum-exp of the
        scores of the others, channel g for head g and channel group - 1 + g for what rounding to
        the cache's type lost. Attention sinks are made of it.
    quantize : str
        4-bit format of queries, keys, attention weights and values (see :mod:`.quantized`); "" for
        none. The cache is then float32 and no layer slides.
    """

    layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotation: Rotation = Rotation()
    soft_cap: float = 0.0
    dtype: str = "float32"
    sliding_window: int | None = None
    attn_kind: str | tuple[str, ...] = "mha"
    page_size: int = PAGE_SIZE
    lse_heads: bool = False
    quantize: str = ""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key/value "
                "heads: expected a multiple; check num_attention_heads and num_key_value_heads"
            )
        if self.head_dim % 16:
            raise ModelError(
                f"head_dim {self.head_dim} is not supported on CPU: expected a multiple of 16"
            )
        if self.rotation.channels > self.head_dim:
            raise ModelError(
                f"rotary_dim {self.rotation.channels} is not supported: expected an even number "
                f"up to head_dim {self.head_dim}"
            )
        if self.dtype not in ("float32", "float16"):
            raise ModelError(f"KV cache type {self.dtype!r}: expected 'float32' or 'float16'")
        if self.page_size % PANEL or self.page_size <= 0:
            raise ModelError(f"KV cache page size {self.page_size}: expected a multiple of {PANEL}")
        for kind in self.kinds:
            if kind not in ATTENTION_KINDS:
                raise ModelError(
                    f"attention kind {kind!r} is unknown: expected one of {ATTENTION_KINDS}"
                )
        if len(self.kinds) != self.layers:
            raise ModelError(f"{len(self.kinds)} attention kinds given for {self.layers} layers")
        if self.quantize and ("mha_sliding" in self.kinds or self.dtype != "float32"):
            raise ModelError(
                f"attention quantized to {self.quantize} has kernels for a float32 cache without "
                "sliding layers only; compile this model without quantized attention"
            )
        if self.lse_heads and (self.quantize or 2 * (self.group - 1) > self.head_dim):
            raise ModelError(
                f"attention sinks need unquantized attention and head_dim {self.head_dim} of at "
                f"least twice the {self.group - 1} query heads of a group"
            )
        if self.quantize and self.page_size % 32:
            raise ModelError(f"KV cache page size {self.page_size}: expected a multiple of 32")
        if "mha_sliding" in self.kinds and not (self.sliding_window or 0) > 0:
            raise ModelError(
                f"sliding layers need a positive sliding_window, got {self.sliding_window}"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The attention kind of every layer."""
        if isinstance(self.attn_kind, str):
            return (self.attn_kind,) * self.layers
        return tuple(self.attn_kind)

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def window(self) -> int:
        """The sliding window, or 0 where no layer slides."""
        return (self.sliding_window or 0) if "mha_sliding" in self.kinds else 0

    @property
    def block(self) -> int:
        """Elements of one page of one head's K or V."""
        return self.page_size * self.head_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token occupies over all layers."""
        width = 2 if self.dtype == "float16" else 4
        return 2 * self.layers * self.num_kv_heads * self.head_dim * width
