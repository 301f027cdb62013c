"""How many tokens a server's cache holds, where nobody says."""

from __future__ import annotations

from pathlib import Path

from amx_tvm.artifact import Manifest
from amx_tvm.artifact.memory import available_memory
from amx_tvm.runtime.budget import kv_bytes

_SHARE = 0.5  # of the memory that is free beside the weights
_CONTEXTS = 4  # where the device's free memory is not known


def default_tokens(path: Path, manifest: Manifest, context: int, places: int) -> int:
    """Return how many tokens the cache should hold.

    As many as all places can need, as long as half of the memory that is free beside the weights
    holds them; on a GPU four contexts.

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
    free = available_memory() if manifest.target.device == "cpu" else None
    if free is None:
        return min(wanted, _CONTEXTS * context)
    weights = sum(file.stat().st_size for file in (path / "params").iterdir())
    return max(context, min(wanted, int(_SHARE * (free - weights)) // kv_bytes(manifest)))
