"""Memory of a model that is loaded, known before anything is loaded.

    weights + library + working memory of a prefill chunk + KV cache + runtime
    + what the process has already

The KV cache takes what the others leave. Working memory is an estimate from the model's sizes, on
the high side: activations of one chunk, kept by the virtual machine's pool for the sizes that
occur. With a limit the weights stay in the mapped file, one copy in memory at most.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from amx_tvm.artifact import Manifest
from amx_tvm.errors import GenerationError, TargetError
from amx_tvm.runtime.choices import ROWS
from amx_tvm.runtime.options import number

CHUNKS = (512, 256, 128, 64, 32)
SMALLEST_CONTEXT = 128  # tokens below which nobody is served
RUNTIME_BYTES = 48 << 20  # tvm_ffi, libtvm_runtime, thread stacks, the tokenizer; measured 20 to 44
# Of a GPU: CUDA's context is there before it is asked; TVM's cache takes 128 MiB whatever its size,
# graphs and tables the rest.
DEVICE_BYTES = 256 << 20
POOLED_CHUNKS = 2  # whose buffers are kept: one of full size and a last, shorter one
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str | float) -> int:
    """Return a size in bytes, of a number or of text such as "300M" or "1.5G" (powers of 1024).

    Raises
    ------
    TargetError
        For anything else.
    """
    if not isinstance(text, str):
        return int(number(1, whole=True, error=TargetError)("memory size", text))
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise TargetError(f"memory size {text!r} is none; expected a number with K, M or G: 300M")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def kv_bytes(manifest: Manifest) -> int:
    """Return the bytes that the KV cache needs for one token."""
    cache = manifest.kv_cache
    if "packed" in cache:
        return -(-int(cache["packed"]["page_bytes"]) // int(cache["page_size"]))
    element = np.dtype(cache["dtype"]).itemsize
    return 2 * cache["layers"] * cache["kv_heads"] * cache["head_dim"] * element


def sequence_bytes(manifest: Manifest) -> int:
    """Return the bytes that the KV cache needs for a sequence, whatever its length."""
    packed = manifest.kv_cache.get("packed")
    return int(packed["sequence_bytes"]) if packed else 0


def panel_bytes(manifest: Manifest) -> int:
    """Return the bytes a token of the context that a prompt's attention decodes few bits into.

    float32 keys and values of two heads: see ``relax_passes/kernels/cpu/packed_cache/prefill.py``.
    GPUs decode into shared memory.
    """
    cache = manifest.kv_cache
    return 2 * 2 * 4 * int(cache["head_dim"]) if "packed" in cache else 0


def working_bytes(manifest: Manifest, chunk: int) -> int:
    """Return an upper estimate of activations and logits for prefill chunks of ``chunk`` tokens."""
    config = manifest.model["config"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * manifest.kv_cache["head_dim"]
    row = 4 * (6 * hidden + 4 * inner + 6 * heads)
    return POOLED_CHUNKS * chunk * row + 2 * 4 * manifest.model["vocab_size"]


def fit(
    manifest: Manifest,
    limit: int,
    context: int | None,
    used: int | None = None,
    sequences: int = 1,
) -> tuple[int, int]:
    """Choose context length and prefill chunk so that everything fits into ``limit`` bytes.

    Parameters
    ----------
    manifest : Manifest
        The model.
    limit : int
        Bytes for the whole process.
    context : int, optional
        Tokens that must fit; by default as many as do, up to the model's own context.
    used : int, optional
        Bytes that the process has now; by default asked of the system.
    sequences : int
        Most sequences at once.

    Returns
    -------
    (int, int)
        Context length and prefill chunk in tokens.

    Raises
    ------
    GenerationError
        With all numbers, if the wanted context (or 128 tokens) does not fit.
    """
    used = resident_bytes() if used is None else used
    weights = sum(shard.bytes for shard in manifest.parameters.shards)
    fixed = used + RUNTIME_BYTES + weights + manifest.library.bytes
    fixed += sequences * sequence_bytes(manifest)
    page, longest = int(manifest.kv_cache["page_size"]), int(manifest.model["context_length"])
    wanted = context or min(SMALLEST_CONTEXT, longest)
    token = kv_bytes(manifest) + panel_bytes(manifest)
    room = 0
    for chunk in CHUNKS:
        room = (limit - fixed - working_bytes(manifest, chunk)) // (page * token) * page
        if room >= max(wanted, min(4 * chunk, longest)) or (room >= wanted and chunk == CHUNKS[-1]):
            return (context or min(room, longest)), chunk
    need = fixed + working_bytes(manifest, CHUNKS[-1]) + wanted * token
    raise GenerationError(
        f"the model does not fit into {_mb(limit)}: the process has {_mb(used)}, the runtime "
        f"takes {_mb(RUNTIME_BYTES)}, weights {_mb(weights)}, the library "
        f"{_mb(manifest.library.bytes)}, working memory "
        f"{_mb(working_bytes(manifest, CHUNKS[-1]))} and {wanted} tokens of context "
        f"{_mb(wanted * token)}: {_mb(need)} together; raise the limit, shorten the context or "
        "take a smaller model"
    )


def require_device(
    manifest: Manifest, free: int, tokens: int, chunk: int, sequences: int = 1
) -> None:
    """Refuse a model that a GPU's free memory does not hold, before anything is loaded.

    Parameters
    ----------
    manifest : Manifest
        The model.
    free : int
        Bytes that are free on the GPU.
    tokens : int
        Of the KV cache.
    chunk : int
        Tokens of a prefill chunk.
    sequences : int
        Most sequences at once.

    Raises
    ------
    GenerationError
        With all numbers, and how many tokens of cache would fit.
    """
    weights = sum(shard.bytes for shard in manifest.parameters.shards)
    working = DEVICE_BYTES + working_bytes(manifest, chunk)
    working += ROWS * 4 * int(manifest.model["vocab_size"])
    working += sequences * sequence_bytes(manifest)
    fixed, token = weights + manifest.library.bytes + working, kv_bytes(manifest)
    if fixed + tokens * token <= free:
        return
    page = int(manifest.kv_cache["page_size"])
    room = (free - fixed) // (page * token) * page
    way = (
        f"{room} tokens fit: load with kv_tokens={room}, shared by all sequences, or fewer, and a "
        "context_length that is no longer"
        if room >= SMALLEST_CONTEXT
        else "free some, take a smaller model or a larger GPU"
    )
    raise GenerationError(
        f"the model does not fit into the {_mb(free)} that are free on the GPU: weights take "
        f"{_mb(weights)}, the library {_mb(manifest.library.bytes)}, working memory "
        f"{_mb(working)} and {tokens} tokens of cache {_mb(tokens * token)}; {way}"
    )


def resident_bytes() -> int:
    """Return the memory that this process occupies now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _mb(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
