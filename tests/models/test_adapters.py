"""LoRA adapters that stay apart from the weights: any family, any rows of one batch."""

from __future__ import annotations

import numpy as np
import pytest

import amx_tvm
from amx_tvm.errors import CalibrationError, GenerationError, ModelError, TargetError
from amx_tvm.runtime.session import decode_batch

from . import tiny, tiny_adapters

LENGTH, PREFILLED, FORKED = 36, 30, 20
RANKS = {"all": 4, "some": 3}
# What families do with linears: fused ones, turned ones, biases, norms behind, experts beside.
USUAL = ("llama", "phi3", "gpt2", "gemma3", "cohere2", "mixtral", "deepseek_v3")
OTHERS = sorted((tiny.CASES | tiny.VARIANTS).keys() - set(USUAL))
FAMILIES = [*USUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


def adapters(model, tmp_path, turned=False):
    """Write one adapter of all linears and one of some; return their parts and directories."""
    ends = ("q_proj", "o_proj", "down_proj", "c_proj", "v_proj", "qkv_proj")
    given = {
        "all": tiny_adapters.pairs(model, RANKS["all"], 1),
        "some": tiny_adapters.pairs(model, RANKS["some"], 2, ends),
    }
    places = {
        name: tiny_adapters.write(tmp_path / "adapters" / name, parts, RANKS[name], turned)
        for name, parts in given.items()
    }
    return given, places


@pytest.fixture(scope="module")
def of_floats(tmp_path_factory):
    """Make a family's model, its adapters and an artifact with both in float32; once each."""
    made = {}

    def make(family):
        if family not in made:
            place = tmp_path_factory.mktemp(family)
            model = tiny.make(family)
            directory = tiny.save(model, place / "model")
            given, places = adapters(model, place, turned=family == "gpt2")
            artifact = amx_tvm.compile(
                directory, quantization="none", adapters=places, output=place / "out"
            )
            made[family] = model, directory, given, places, artifact
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_adapters_equals_their_merged_models(family, of_floats):
    model, _, given, _, made = of_floats(family)
    assert all(given.values())
    engine = amx_tvm.load(made.path, kv_tokens=1024)
    assert engine.adapters == ("all", "some")
    ids = np.random.default_rng(1).integers(3, tiny.VOCAB, LENGTH).tolist()
    expected = {name: tiny.logits(tiny_adapters.merged(model, given[name]), ids) for name in given}
    expected[None] = tiny.logits(model, ids)
    for name, wanted in expected.items():
        assert tiny.relative_error(np.asarray(engine.logits(ids, adapter=name)), wanted) < 1e-4
    assert tiny.relative_error(expected["all"], expected[None]) > 0.1  # they do something
    names = ["all", None, "some", "all"]
    sequences = [engine.sequence(name) for name in names]
    for sequence in sequences:
        sequence.append(ids[:PREFILLED])
    for place in range(PREFILLED, LENGTH):
        rows = decode_batch(sequences, [ids[place]] * len(names))
        for name, row in zip(names, rows, strict=True):
            assert tiny.relative_error(row, expected[name][place]) < 1e-4
    child = sequences[2].fork(FORKED)
    sequences[2].rollback(LENGTH - FORKED)
    for sequence in (child, sequences[2]):
        row = sequence.append(ids[FORKED:])
        assert tiny.relative_error(row, expected["some"][-1]) < 1e-4


@pytest.fixture(scope="module")
def small(of_floats, tmp_path_factory):
    """A Llama, its adapters, and an artifact with both in AMXFP4."""
    model, directory, given, places, _ = of_floats("llama")
    output = tmp_path_factory.mktemp("amxfp4") / "out"
    made = amx_tvm.compile(
        directory, quantization="amxfp4", strict=True, adapters=places, output=output
    )
    return model, directory, given, places, made


def test_only_weights_are_rounded(small):
    """Merged in torch after rounding the base: what stays apart is kept as it is."""
    model, _, given, _, made = small
    rounded = tiny.fake_quantize(tiny_adapters.merged(model, {}), "amxfp4", "int8")
    expected = tiny.logits(tiny_adapters.merged(rounded, given["all"]), list(range(3, 40)))
    got = np.asarray(amx_tvm.load(made.path).logits(range(3, 40), adapter="all"))
    assert tiny.relative_error(got, expected) < 1e-4


def test_text_of_floats_is_that_of_the_merged_model(of_floats, tmp_path):
    _, directory, _, places, apart = of_floats("llama")
    engine = amx_tvm.load(apart.path)
    for name, place in places.items():
        one = amx_tvm.compile(directory, adapter=place, quantization="none", output=tmp_path / name)
        expected = amx_tvm.load(one.path).generate([5, 6, 7] * 4, 32, ignore_eos=True).token_ids
        assert (
            engine.generate([5, 6, 7] * 4, 32, adapter=name, ignore_eos=True).token_ids == expected
        )


def test_requests_of_a_batch_choose(small):
    engine = amx_tvm.load(small[-1].path, kv_tokens=2048)
    prompt, names = [5, 6, 7] * 8, [None, "all", "some", "all"]
    alone = {n: engine.generate(prompt, 12, adapter=n, ignore_eos=True).token_ids for n in names}
    assert len({tuple(ids) for ids in alone.values()}) == 3
    results = engine.generate_batch([prompt] * 4, 12, adapter=names, ignore_eos=True)
    assert [r.token_ids for r in results] == [alone[name] for name in names]
    both = engine.generate_batch([prompt] * 2, 12, adapter="some", ignore_eos=True)
    assert [r.token_ids for r in both] == [alone["some"]] * 2


def test_what_is_kept_is_kept_for_one_adapter(small):
    engine = amx_tvm.load(small[-1].path, kv_tokens=2048)
    prompt, found = [5, 6, 7] * 12, {}
    with engine.scheduler(keep=4) as scheduler:
        for name in (None, "all", "some", "all"):
            handle = scheduler.add(
                engine.request(prompt, adapter=name, max_new_tokens=8, ignore_eos=True)
            )
            while scheduler.step():
                pass
            computed = handle.result.timings.prefill_tokens
            assert (computed < 36) == (name in found)
            assert found.setdefault(name, handle.result.token_ids) == handle.result.token_ids
    assert len({tuple(ids) for ids in found.values()}) == 3


def test_steps_without_adapters_are_the_functions_they_were(small, tmp_path):
    """An artifact with adapters has the functions of one without, and one more."""
    _, directory, _, _, made = small
    plain = amx_tvm.compile(directory, quantization="amxfp4", strict=True, output=tmp_path / "out")
    assert set(made.manifest.functions) - set(plain.manifest.functions) == {"forward_adapted"}
    assert made.manifest.linears == plain.manifest.linears
    assert made.bits_per_weight == pytest.approx(plain.bits_per_weight)
    ids = list(range(3, 30))
    engines = [amx_tvm.load(one.path) for one in (plain, made)]
    np.testing.assert_array_equal(*(np.asarray(engine.logits(ids)) for engine in engines))
    assert "adapters" not in plain.manifest.model
    with pytest.raises(GenerationError, match="compile the model with adapters="):
        engines[0].generate([5], adapter="all")


def test_names_that_are_none_are_told(small):
    engine = amx_tvm.load(small[-1].path)
    with pytest.raises(GenerationError, match="'none', this artifact has all, some"):
        engine.generate([5], adapter="none")
    with pytest.raises(GenerationError, match="2 names for 1 prompts"):
        engine.generate_batch([[5]], adapter=["all", "some"])
    with engine.sequence("all") as sequence:
        with pytest.raises(GenerationError, match="begun with adapter 'all'.* asks for no adapter"):
            engine.generate([5], sequence=sequence)
        assert engine.generate([5], 2, sequence=sequence, adapter="all").token_ids


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"modules": ["lm_head"]}, "lm_head, which is no linear that takes adapters apart"),
        ({"rank": 5}, r"has A \[4, 64\] and B \[64, 4\]; expected \[5, in\]"),
        ({"names": ["a b"]}, "'a b' names an adapter"),
        ({"names": []}, "expected 1 to 256 names"),
        ({"base": "qwen3"}, "use the base model that the adapter was trained on"),
        ({"calibration": "some text"}, "leave out the calibration"),
        ({"target": "cuda:sm_90a"}, "on CPUs only"),
        ({"huge": True}, "which float16 does not hold"),
    ],
)
def test_what_does_not_fit_is_refused(small, change, word, tmp_path):
    _, directory, _, _, _ = small
    model = tiny.make("llama")
    if "base" in change:
        directory = tiny.save(tiny.make(change["base"]), tmp_path / "base")
    given = tiny_adapters.pairs(model, 4, 1, ("q_proj",))
    if "modules" in change:
        given = {"lm_head": (np.ones((4, 64), np.float32), np.ones((tiny.VOCAB, 4), np.float32))}
    if "huge" in change:
        given = {name: (a, b * np.float32(1e6)) for name, (a, b) in given.items()}
    place = tiny_adapters.write(tmp_path / "adapter", given, change.get("rank", 4))
    text = None
    if "calibration" in change:
        text = tmp_path / "text.txt"
        text.write_text(change["calibration"])
    with pytest.raises((ModelError, TargetError, CalibrationError), match=word):
        amx_tvm.compile(
            directory,
            adapters={name: place for name in change.get("names", ["a"])},
            calibration=text,
            target=change.get("target", "llvm"),
            output=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()
