"""The change that takes weights off their grid, before other quantizers make files of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from amx_tvm.calibration.block import open_decoder
from benchmarks.torch_reference import Reference

from .tiny import TinySource

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def block_name(name: str) -> str:
    """llama.cpp's name of a layer's parameter, other names as they are."""
    if not name.startswith("model.layers."):
        return name
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[part.removesuffix('.weight')]}.weight"


def test_scattered_weights_are_the_same_network(monkeypatch):
    """Two query heads read each head of values, so a factor of a row is that of two columns."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accuracy_peers

    source, ids = TinySource(), list(range(40))
    exact = Reference(source)(ids)
    before = {block_name(name): array for name, array in source.arrays.items()}
    after = accuracy_peers.scattered(before, open_decoder(source)[1])
    for name in source.arrays:
        source.arrays[name] = after[block_name(name)].astype(np.float32)
    assert np.linalg.norm(Reference(source)(ids) - exact) < 1e-5 * np.linalg.norm(exact)
    for name, array in before.items():
        changed = name.startswith("blk.")
        assert np.allclose(array, after[name], rtol=1e-3) != changed, name
