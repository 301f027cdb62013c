"""Fetching a model by its hub id, where huggingface_hub is installed and a network is there."""

from __future__ import annotations

from pathlib import Path

from amx_tvm.errors import ModelError
from amx_tvm.extras import require

# Weights in one format, the configuration and the tokenizer: nothing that runs code.
PATTERNS = ["*.json", "*.safetensors", "*.jinja"]


def download(repo_id: str) -> Path:
    """Return the local directory of a hub model, downloading what is not there yet.

    Raises
    ------
    ModelError
        When huggingface_hub is missing, or the hub cannot be reached or refuses.
    """
    use = f"{repo_id} is no local path, and downloading it from the hub"
    hub = require("huggingface_hub", "hub", use, ModelError)
    try:
        return Path(hub.snapshot_download(repo_id, allow_patterns=PATTERNS))
    except Exception as error:  # a wide family: HTTP, DNS, cache and authorization errors
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ModelError(
            f"{repo_id} is no local path and could not be fetched from the hub ({reason}); give a "
            "local directory or .gguf file, or check the id and the network"
        ) from error
