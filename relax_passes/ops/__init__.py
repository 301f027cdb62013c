"""The project's own Relax operators: what a quantized model is made of until legalization.

``amx.linear``              y[.., N] = x[.., K] @ W[N, K]^T, with an optional epilogue
``amx.quantize_activation`` x -> (codes, scales, sums), optionally behind RMSNorm or silu(a) * b
``amx.embedding``           rows of a packed table as float32
``amx.expert_matmul``       a mixture's products before annotation: rows sorted by expert
``amx.expert_route``        which experts a row takes, and their shares
``amx.expert_group``        rows sorted by expert
``amx.expert_combine``      each row's products, added by their shares
``amx.clamped_gate``        (up + 1) * gate * sigmoid(alpha * gate), both bounded first
``amx.adapter_down``        products of rows with their LoRA adapter's A
``amx.adapter_up``          a linear's result and the products with B
``amx.kv_cache``            the paged cache of keys and values
``amx.attention``           appends a layer's keys and values to it and attends
``amx.packed_attention``    attention inside each of several texts, one behind the other, no cache
``amx.mean_rows``           the mean of each of several spans of rows

Each is a first-class operator with a purity and a type rule, so every stock Relax pass (dead code,
common subexpressions, memory planning) understands a module that holds them. Their attributes are
one frozen dataclass each; ``of(call)`` reads it back.
"""

from __future__ import annotations

from .adapters import AdapterAttrs, adapter_attrs, adapter_down, adapter_up
from .attending import (
    Attention,
    attention,
    kv_cache,
    mean_rows,
    packed_attention,
)
from .base import is_op
from .experts import (
    clamped_gate,
    expert_combine,
    expert_group,
    expert_matmul,
    expert_route,
)
from .linear import (
    EmbeddingAttrs,
    Linear,
    LinearAttrs,
    QuantizeAttrs,
    activation_parts,
    embedding,
    embedding_attrs,
    quantize_activation,
    quantize_attrs,
)

__all__ = [
    "AdapterAttrs",
    "Attention",
    "EmbeddingAttrs",
    "Linear",
    "LinearAttrs",
    "QuantizeAttrs",
    "activation_parts",
    "adapter_attrs",
    "adapter_down",
    "adapter_up",
    "attention",
    "clamped_gate",
    "embedding",
    "embedding_attrs",
    "expert_combine",
    "expert_group",
    "expert_matmul",
    "expert_route",
    "is_op",
    "kv_cache",
    "mean_rows",
    "packed_attention",
    "quantize_activation",
    "quantize_attrs",
]
