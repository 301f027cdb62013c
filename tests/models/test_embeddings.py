"""Every family of embeddings against transformers, and what an engine of them refuses."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import amx_tvm
from amx_tvm.calibration.embedding import calibrate_embedding
from amx_tvm.compiler.checkpoint import quantize_checkpoint
from amx_tvm.compiler.lowered import lower_source
from amx_tvm.config import QuantizationConfig
from amx_tvm.documents import read_documents
from amx_tvm.errors import CalibrationError, GenerationError, ModelError
from amx_tvm.frontends import open_model
from amx_tvm.models import families
from amx_tvm.targets import resolve

from . import tiny, tiny_embedding

LENGTHS = (5, 1, 60, 33)  # beyond the windows, and of one block of keys and more


def test_every_family_has_a_case():
    known = sorted(family.name for family in families("embedding"))
    assert known == sorted(tiny_embedding.CASES)


@pytest.fixture(scope="module", params=sorted(tiny_embedding.CASES))
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_embedding.make(request.param, folder / "model")
    amx_tvm.compile(folder / "model", quantization="none", output=folder / "out")
    return model, folder / "model", amx_tvm.load(folder / "out")


def test_vectors_equal_torch(made):
    model, directory, engine = made
    generator = np.random.default_rng(1)
    tokens = [generator.integers(3, tiny.VOCAB, n).tolist() for n in LENGTHS]
    got = engine.embed(tokens)
    assert got.dtype == np.float32 and got.shape == (len(tokens), engine.dimension)
    expected = tiny_embedding.vectors(model, directory, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4 / np.sqrt(engine.dimension))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The engine of a model whose mean leaves the prompt out."""
    folder = tmp_path_factory.mktemp("embedding")
    model = tiny_embedding.make("bert", folder / "model")
    artifact = amx_tvm.compile(folder / "model", strict=True, output=folder / "out")
    assert artifact.manifest.kind == "embedding"
    tiny.fake_quantize(model, "amxfp4", "int8")
    return model, folder / "model", amx_tvm.load(folder / "out")


def test_amxfp4_equals_the_rounded_model(bert):
    model, directory, engine = bert
    tokens = [list(range(3, 40)), [5]]
    expected = tiny_embedding.vectors(model, directory, tokens)
    np.testing.assert_allclose(engine.embed(tokens), expected, atol=2e-5)


def test_prompts_stand_in_front_and_are_not_averaged(bert):
    model, directory, engine = bert
    got = engine.embed(["w20 w21", "w22"], prompt_name="query")
    tokens = [[3, 7, 8, 9, 20, 21, 2], [3, 7, 8, 9, 22, 2]]
    expected = tiny_embedding.vectors(model, directory, tokens, skipped=4)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    same = engine.embed(["w20 w21", "w22"], prompt=tiny_embedding.PROMPTS["query"])
    np.testing.assert_array_equal(same, got)
    plain = engine.embed("w20 w21", prompt_name="document")
    np.testing.assert_array_equal(plain, engine.embed([[3, 20, 21, 2]])[0])


def test_batches_of_any_size_equal_one_by_one(bert):
    engine = bert[2]
    generator = np.random.default_rng(2)
    sizes = generator.integers(1, 90, 40)  # several calls of the function
    texts = [generator.integers(3, tiny.VOCAB, n).tolist() for n in sizes]
    alone = np.stack([engine.embed([text])[0] for text in texts])
    np.testing.assert_allclose(engine.embed(texts), alone, atol=2e-6)
    assert engine.embed([]).shape == (0, engine.dimension)


def test_dimensions_are_cut_and_normalized_again(bert):
    engine = bert[2]
    whole, cut = engine.embed("w5 w6"), engine.embed("w5 w6", dimensions=16)
    assert cut.shape == (16,) and abs(np.linalg.norm(cut) - 1) < 1e-6
    np.testing.assert_allclose(cut, whole[:16] / np.linalg.norm(whole[:16]), atol=1e-6)


def test_the_example_of_a_search(bert, tmp_path, monkeypatch, capsys):
    lines = tmp_path / "lines.txt"
    lines.write_text("w7 w8\nw20 w21 w22\n\nw5\nw30 w31\n")
    program = Path(__file__).parents[2] / "examples" / "search.py"
    artifact = bert[1].parent / "out"
    monkeypatch.setattr(sys, "argv", [str(program), str(artifact), str(lines), "w20 w21 w22"])
    runpy.run_path(str(program), run_name="__main__")
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "1.000  w20 w21 w22" and len(others) == 2


LONG = " ".join(["w5"] * 200)


def test_long_texts_are_cut_on_request_only(bert):
    engine = bert[2]
    with pytest.raises(GenerationError, match=r"text 1 has 202 tokens, the model takes 96; .*cut"):
        engine.embed(["w5", LONG])
    cut = engine.embed([[3, *[5] * 94, 2]])[0]
    np.testing.assert_array_equal(engine.embed(LONG, truncate=True), cut)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (
            ["w5", ""],
            {"prompt_name": "q"},
            "prompt_name is 'q', expected one of 'document', 'query'",
        ),
        ("w5", {"prompt_name": "query", "prompt": "x"}, "expected one of them"),
        ("w5", {"dimensions": 65}, "dimensions is 65, expected .* 64, the model's own"),
        ([[]], {}, "text 0 has no tokens"),
        ([[96]], {}, "text 0 has the token 96, expected integers from 0 to 95"),
        ([[3] * 97], {}, "text 0 has 97 tokens"),
        ([None], {}, "text 0 is None, expected a text or token ids"),
        (["\udc80"], {}, "text 0 holds a byte"),
    ],
)
def test_what_is_refused(bert, texts, options, message):
    with pytest.raises(GenerationError, match=message):
        bert[2].embed(texts, **options)


def test_the_modules_of_others_are_refused_by_name(bert, tmp_path):
    def damaged(file, change):
        place = tmp_path / file.replace("/", "-")
        shutil.copytree(bert[1], place)
        value = json.loads((place / file).read_text(encoding="utf-8"))
        (place / file).write_text(json.dumps(change(value)), encoding="utf-8")
        return place

    cases = [
        ("modules.json", lambda v: [*v[:2], {"type": "x.LSTM", "path": ""}], "chain .* LSTM"),
        ("1_Pooling/config.json", lambda _: {"pooling_mode": "max"}, r"pools by \['max'\]"),
        (
            "config_sentence_transformers.json",
            lambda v: v | {"default_prompt_name": "passage"},
            "default_prompt_name is 'passage', expected one of query, document",
        ),
        ("sentence_bert_config.json", lambda _: {"max_seq_length": "long"}, "max_seq_length"),
        (
            "config.json",
            lambda v: v | {"architectures": ["MPNetModel"], "model_type": "mpnet"},
            "as a model of kind embedding, architecture 'MPNetModel' is not supported",
        ),
    ]
    for file, change, message in cases:
        with pytest.raises(ModelError, match=message):
            open_model(damaged(file, change))


def test_a_gpu_gets_its_own_kernels_and_no_copy_around_attention(bert):
    config = QuantizationConfig().resolve("cuda")
    lowered = lower_source(open_model(bert[1]), resolve("cuda:sm_90a"), config)
    kernels = {gvar.name_hint for gvar in lowered.module.get_global_vars()}
    assert {"attention", "mean_rows", "gelu_k96_any", "layer_norm_k64_any"} <= kernels
    assert not [name for name in kernels if "split" in name or "cast" in name]
    assert {entry["kernel"] for entry in lowered.linears} == {"cuda-fragment"}


def test_no_bundle_and_no_checkpoint_is_made(bert, tmp_path):
    with pytest.raises(ModelError, match="makes embeddings, which no bundle runs"):
        amx_tvm.export(bert[1], "llvm:x86-64-v3", tmp_path / "bundle", runtimes=())
    with pytest.raises(ModelError, match="is no language model"):
        quantize_checkpoint(bert[1], tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


def test_calibration_by_the_lines_of_a_text(bert, tmp_path):
    text = tmp_path / "text"
    generator = np.random.default_rng(4)
    lines = [" ".join(f"w{i}" for i in generator.integers(4, 96, 12)) for _ in range(40)]
    text.write_text("\n".join(lines), encoding="utf-8")
    source = open_model(bert[1])
    made = calibrate_embedding(source, read_documents(text), QuantizationConfig("amxfp4"))
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    assert {f"model.layers.1.{name}.weight" for name in names} <= set(made.quantized)
    assert len(made.quantized) == 2 * 6 and max(made.errors.values()) < 0.05
    with pytest.raises(CalibrationError, match="it is a file of text, whose lines are texts"):
        amx_tvm.compile(bert[1], calibration=[(1,)], output=tmp_path / "out")
