"""How many tokens a server's cache holds, where nobody says."""

from __future__ import annotations

from pathlib import Path

from amx_tvm.artifact import Manifest
from amx_tvm.artifact.memory import available_memory
from amx_tvm.runtime.budget import DEVICE_BYTES, kv_bytes, sequence_bytes
from amx_tvm.runtime.vm import free_memory

_SHARE, _DEVICE_SHARE = 0.5, 0.9  # of the memory that is free beside the weights
_CONTEXTS = 4  # where the device's free memory is not known


def default_tokens(path: Path, manifest: Manifest, context: int, places: int) -> int:
    """Return how many tokens the cache should hold.

    As many as all places can need, as long as half of the memory that is free beside the weights
    holds them, of a GPU nine tenths; four contexts where the device does not say what is free.

    Parameters
    ----------
    path, manifest : Path, Manifest
        The artifact.
    context : int
        Longest prompt and answer in tokens.
    places : int
        Answers that are generated at once.
    """
    wanted = places * context
    on_cpu = manifest.target.device == "cpu"
    free = available_memory() if on_cpu else free_memory(manifest.target.device)
    if free is None:
        return min(wanted, _CONTEXTS * context)
    weights = sum(file.stat().st_size for file in (path / "params").iterdir())
    beside = free - weights - (0 if on_cpu else DEVICE_BYTES) - places * sequence_bytes(manifest)
    share = _SHARE if on_cpu else _DEVICE_SHARE
    return max(context, min(wanted, int(share * beside) // kv_bytes(manifest)))
