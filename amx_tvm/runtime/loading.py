"""load(): from an artifact directory to an engine, checked before any of its code runs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from amx_tvm.artifact import verify_artifact
from amx_tvm.artifact.occupant import one_directory
from amx_tvm.artifact.verify import Verify
from amx_tvm.runtime import budget
from amx_tvm.runtime.embedding import EmbeddingEngine
from amx_tvm.runtime.engine import DEFAULT_CONTEXT, Engine
from amx_tvm.runtime.function import FunctionEngine
from amx_tvm.runtime.library import installed_versions, set_threads
from amx_tvm.runtime.vm import Memory, VirtualMachine, free_memory

DEFAULT_CHUNK = 512
log = logging.getLogger("amx_tvm.runtime")


@one_directory
def load(
    path: Path | str,
    device: str | None = None,
    context_length: int | None = None,
    threads: int | None = None,
    verify: Verify | bool = "quick",
    require_signature: str | os.PathLike[str] | None = None,
    max_sequences: int = 16,
    kv_tokens: int | None = None,
    memory: Memory = "auto",
    max_memory: int | str | None = None,
    speculation: bool = False,
) -> Engine | FunctionEngine | EmbeddingEngine:
    """Load an artifact; one that is replaced meanwhile is loaded as it is then.

    Parameters
    ----------
    path : Path or str
        The artifact directory.
    device : str, optional
        "cpu", "cuda" or "cuda:<index>"; by default the artifact's.
    context_length : int, optional
        Longest sequence in tokens, prompt and new tokens together; by default the smaller of the
        model's context and 4096. Sizes the KV cache, which is allocated at the first use.
    threads : int, optional
        CPU threads; by default ``TVM_NUM_THREADS`` or the physical cores.
    verify : False, "quick" or "full"
        How deep the files are checked; see `amx_tvm.artifact.verify`.
    require_signature : path, optional
        A public key (Ed25519, PEM) by which the artifact must be signed; the files are checked as
        "full" does.
    max_sequences : int
        Most sequences at once, forks included.
    kv_tokens : int, optional
        Tokens that the KV cache holds for all sequences together; by default ``context_length``.
        `Engine.generate_batch` makes it larger where it needs to, unless ``max_memory`` is given.
    memory : "auto", "map" or "huge"
        Where the CPU reads weights from: the mapped file, or a copy in huge pages, which decodes
        faster (`amx_tvm.artifact.memory`); "auto" takes the copy where the machine has room.
    max_memory : int or str, optional
        Most memory of the whole process, in bytes or as "300M". The KV cache takes what the weights
        leave, ``context_length`` is as long as fits unless it is given, and the weights are mapped.
    speculation : bool
        Whether text that repeats is decoded several tokens a step (`amx_tvm.runtime.speculation`).
        Where steps of several rows round differently, as with int8 activations, near ties of
        greedy decoding may fall otherwise; strict artifacts give the same text.

    Returns
    -------
    Engine, EmbeddingEngine or FunctionEngine
        By the artifact's kind: a language model, a model that makes vectors of texts, or a
        compiled module called like a function.

    Raises
    ------
    ArtifactError
        The artifact is incomplete, damaged, or made for another machine, version or schema.
    GenerationError
        The model does not fit into ``max_memory``, or into a GPU; nothing was loaded.
    """
    root = Path(path)
    manifest = verify_artifact(root, verify, installed_versions(), device, require_signature)
    threads = set_threads(threads)
    chunk = int(manifest.kv_cache.get("prefill_chunk", DEFAULT_CHUNK))
    sequences = max_sequences if isinstance(max_sequences, int) else 1  # the engine's to refuse
    if max_memory is not None and manifest.kind == "causal_lm":
        limit = budget.parse_size(max_memory)
        context_length, chunk = budget.fit(manifest, limit, context_length, sequences=sequences)
        memory = "map"
    target = manifest.target
    log.info(
        "%s, checked (%s): %s on %s, %d threads",
        root,
        verify,
        target.key,
        device or target.device,
        threads,
    )
    machine = VirtualMachine(root / manifest.library.file, device or target.device, target.features)
    if manifest.kind == "function":
        return FunctionEngine(root, manifest, machine, memory, threads)
    if manifest.kind == "embedding":
        return EmbeddingEngine(root, manifest, machine, memory, threads)
    if not machine.is_cpu and (free := free_memory(device or target.device)) is not None:
        usual = min(int(manifest.model["context_length"]), DEFAULT_CONTEXT)
        # what is no number is the engine's to refuse
        tokens = next((n for n in (kv_tokens, context_length) if isinstance(n, int)), usual)
        budget.require_device(manifest, free, tokens, chunk, sequences)
    return Engine(
        root,
        manifest,
        machine,
        context_length,
        max_sequences,
        kv_tokens,
        memory,
        chunk,
        may_grow=max_memory is None,
        threads=threads,
        speculation=speculation,
    )
