"""evaluate(), texts, reports, layer errors and the task adapter, on an engine made of numbers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from amx_tvm import formats
from amx_tvm.errors import EvaluationError
from amx_tvm.evaluation import (
    Protocol,
    by_layer,
    evaluate,
    plot,
    read_documents,
    read_text,
    settings,
    table,
    to_json,
    weight_errors,
)
from amx_tvm.evaluation.harness import EngineModel, run_tasks
from amx_tvm.evaluation.report import rows
from amx_tvm.extras import plotting

VOCAB = 128


class LetterEngine:
    """A model whose next token depends on the last one; its tokens are ASCII codes."""

    def __init__(self, noise: float = 0.0, context: int = 64, vocab: int = VOCAB, bits=4.5):
        rng = np.random.default_rng(3)
        self.table = rng.normal(0, 2, (VOCAB, vocab)) + np.random.default_rng(4).normal(
            0, noise, (VOCAB, vocab)
        )
        self.context_length, self.path = context, "dist/letters"
        quantization = {} if bits is None else {"bits_per_weight": bits}
        model = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_ids": [2]}
        model["context_length"] = context
        self.manifest = SimpleNamespace(model=model, quantization=quantization)

    def encode(self, text: str) -> list[int]:
        return [min(ord(c), VOCAB - 1) for c in text]

    def logits(self, ids):
        assert 0 < len(ids) <= self.context_length
        return self.table[np.asarray(ids)].astype(np.float32)

    def generate(self, ids, max_new_tokens, stop, **options):
        assert len(ids) + max_new_tokens <= self.context_length
        text = "".join(map(chr, ids))
        return SimpleNamespace(text=f"{text}|{max_new_tokens}|{stop}|{options}")


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    return path


def test_evaluate_a_file_against_a_reference(story):
    exact, other = LetterEngine(), LetterEngine(noise=0.3)
    result = evaluate(other, story, reference=exact, protocol=Protocol(64, limit=5), start=7)
    ids = other.encode(story.read_text()[7:])[: 5 * 64]
    want = 0.0
    for window in np.array(ids).reshape(5, 64):
        logits = other.logits(window)[:-1].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want -= logp[np.arange(63), window[1:]].sum()
    assert result.perplexity == pytest.approx(math.exp(want / (5 * 63)), rel=1e-9)
    assert result.name == "letters" and result.bits == 4.5
    assert result.kl > 0 and result.top1 < 1
    assert evaluate(exact, ids, reference=exact.logits, protocol=Protocol(64)).kl == 0


def test_overlap_is_warned_of(story, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Nothing of the kind. " * 50)
    with pytest.warns(UserWarning, match="occurs in the calibration text"):
        evaluate(LetterEngine(), story, protocol=Protocol(64), calibration=story)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(LetterEngine(), story, protocol=Protocol(64), calibration=other)


def test_bad_input(story, tmp_path):
    with pytest.raises(EvaluationError, match="context"):
        evaluate(LetterEngine(), story, protocol=Protocol(65))
    with pytest.raises(EvaluationError, match="less than one window"):
        evaluate(LetterEngine(), story, protocol=Protocol(64), start=1170)
    with pytest.raises(EvaluationError, match="share their tokenizer"):
        evaluate(LetterEngine(), story, reference=LetterEngine(vocab=130), protocol=Protocol(64))
    with pytest.raises(EvaluationError, match="reference of type"):
        evaluate(LetterEngine(), story, reference=5, protocol=Protocol(64))
    with pytest.raises(EvaluationError, match="does not exist"):
        evaluate(LetterEngine(), tmp_path / "absent.txt", protocol=Protocol(64))
    with pytest.raises(EvaluationError, match="compiled function"):
        evaluate(SimpleNamespace(), story)


@pytest.mark.parametrize("name", ["window", "stride", "limit"])
def test_wrong_numbers_of_a_protocol_are_named(name):
    assert Protocol(**{name: None}) == Protocol()
    assert Protocol(**{name: 2.0}) == Protocol(**{name: 2})
    for value in (float("nan"), "2", 1.5, True, [2]):
        with pytest.raises(EvaluationError, match=f"{name} is .*, expected an integer"):
            Protocol(**{name: value})


@pytest.mark.parametrize("text", [None, 5, b"x", [float("nan")] * 99, ["a"] * 99, ""])
def test_texts_that_are_no_texts_are_named(text):
    with pytest.raises(EvaluationError, match="expected"):
        evaluate(LetterEngine(), text, protocol=Protocol(64))


@pytest.mark.parametrize("start", [-1, float("nan"), "x", 1.5])
def test_wrong_starts_are_named(story, start):
    with pytest.raises(EvaluationError, match="start is"):
        evaluate(LetterEngine(), story, protocol=Protocol(64), start=start)


def test_texts_of_every_kind(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    (tmp_path / "c.json").write_text(json.dumps([{"text": "four"}, "five"]))
    (tmp_path / "README.md").write_text("not part of the data")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert list(read_documents(tmp_path)) == ["one", "two", "three", "four", "five"]
    assert read_text(tmp_path / "b.jsonl") == "two\n\nthree"
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n')
    with pytest.raises(EvaluationError, match="'text'; it has: body"):
        list(read_documents(tmp_path / "b.jsonl"))
    assert read_text(tmp_path / "b.jsonl", field="body") == "two"
    (tmp_path / "b.jsonl").write_text("{broken\n")
    with pytest.raises(EvaluationError, match="cannot be read"):
        list(read_documents(tmp_path / "b.jsonl"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_text(tmp_path / "bytes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds no text"):
        read_text(tmp_path / "empty")


def test_table_json_and_plot(story, tmp_path):
    exact = LetterEngine(bits=None)
    results = [
        evaluate(exact, story, protocol=Protocol(64), name="float32"),
        evaluate(
            LetterEngine(noise=0.3), story, reference=exact, protocol=Protocol(64), name="amxfp4"
        ),
    ]
    text = table(results, baseline=results[0].perplexity)
    head, first, second = text.splitlines()
    assert head.split()[0] == "name" and "KL" in head
    assert "+0.0 %" in first and second.startswith("amxfp4") and "4.50" in second
    assert "KL" not in table(results[:1]).splitlines()[0]
    assert rows(results)[1][1] == "4.50"
    document = json.loads(to_json(results, settings(Protocol(64), story)))
    assert document["settings"]["window"] == 64 and document["results"][0]["kl"] is None
    path = tmp_path / "plot.png"
    plot(results, path, {"amxfp4": [0.1, 0.2]}, results[0].perplexity)
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000
    with pytest.raises(EvaluationError, match="nothing to draw"):
        plot(results[:1], path)
    with pytest.raises(EvaluationError, match="end in"):
        plot(results, tmp_path / "plot.xyz")
    with pytest.raises(EvaluationError, match="folder of .* does not exist"):
        plotting(tmp_path / "absent" / "plot.png", EvaluationError)


def test_weight_errors_by_layer():
    rng = np.random.default_rng(0)
    shapes = {"model.norm.weight": (64,), "model.embed_tokens.weight": (96, 64)}
    for layer in range(2):
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (64,)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (96, 64)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (64, 96)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    source = SimpleNamespace(
        names=lambda: list(arrays), shape=lambda n: arrays[n].shape, load=lambda n: arrays[n]
    )
    errors = list(weight_errors(source, ["amxfp4", "mxfp4"]))
    assert len(errors) == 4 and {e.layer for e in errors} == {0, 1}
    weight = arrays[errors[0].name]
    rounded = formats.get("mxfp4").quantize_dequantize(weight)
    want = np.square(rounded - weight).sum() / np.square(weight).sum()
    assert errors[0].errors["mxfp4"] == pytest.approx(want, rel=1e-5)
    means = {name: by_layer(errors, name) for name in ("amxfp4", "mxfp4")}
    assert len(means["amxfp4"]) == 2
    assert all(a < b for a, b in zip(means["amxfp4"], means["mxfp4"], strict=True))


def request(*arguments):
    return SimpleNamespace(args=arguments)


def test_task_adapter_scores_continuations():
    engine = LetterEngine(context=32)
    model = EngineModel(engine)
    logp = engine.table - np.log(np.exp(engine.table).sum(-1, keepdims=True))

    def want(text, start):
        ids = engine.encode(text)
        return sum(logp[ids[i - 1], ids[i]] for i in range(start, len(ids)))

    got = model.loglikelihood([request("ab", " cd"), request("", "xyz"), request("ab ", "cd")])
    assert got[0][0] == pytest.approx(want("ab cd", 2), rel=1e-5)
    assert got[1][0] == pytest.approx(logp[1, ord("x")] + want("xyz", 1), rel=1e-5)
    assert got[2][0] == pytest.approx(got[0][0], rel=1e-6)
    best = chr(int(engine.table[ord("b")].argmax()))
    assert model.loglikelihood([request("ab", best)])[0][1] is True
    long = "the quick brown fox jumps over the lazy dog and runs away " * 3
    rolled = model.loglikelihood_rolling([request(long)])[0]
    assert rolled == pytest.approx(logp[1, ord("t")] + want(long, 1), rel=1e-5)
    assert model.generate_until([request("p", {"until": ["\n"], "max_gen_toks": 5})]) == [
        "p|5|('\\n',)|{}"
    ]
    with pytest.raises(EvaluationError, match="does not fit the context"):
        model.loglikelihood([request("a", "b" * 40)])


GREEDY = {"until": ["\n"], "max_gen_toks": 4}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"until": None, "max_gen_toks": None, "temperature": None}, "p|9|()|{}"),
        ({"until": "", "max_new_tokens": 4}, "p|4|()|{}"),
        ({"until": ["\n", ""], "max_gen_toks": 4.0, "num_beams": 1}, "p|4|('\\n',)|{}"),
        ({**GREEDY, "do_sample": False, "temperature": 0.7, "top_p": 0.9}, "p|4|('\\n',)|{}"),
        ({**GREEDY, "do_sample": True}, "p|4|('\\n',)|{'temperature': 1.0}"),
        ({**GREEDY, "temperature": 0.0}, "p|4|('\\n',)|{'temperature': 0.0}"),
        (
            {**GREEDY, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": None},
            "p|4|('\\n',)|{'temperature': 0.7, 'top_p': 0.9}",
        ),
    ],
    ids=str,
)
def test_options_of_tasks(options, expected):
    model = EngineModel(LetterEngine(), max_new_tokens=9)
    assert model.generate_until([request("p", options)]) == [expected]


def test_options_that_engines_lack_are_named():
    model = EngineModel(LetterEngine())
    for options, word in (({"num_beams": 4}, "beam search"), ({"typical_p": 0.5}, "typical_p")):
        with pytest.raises(EvaluationError, match=word):
            model.generate_until([request("p", {**GREEDY, **options})])
    for options, word in (
        ({"max_gen_toks": "abc"}, "max_gen_toks is 'abc'"),
        ({"max_tokens": float("nan")}, "max_tokens is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"until": 5}, "until is 5"),
        ({"until": ["a", 5]}, "until is"),
        ({"do_sample": "false"}, "do_sample is 'false'"),
        (None, "options are None"),
    ):
        with pytest.raises(EvaluationError, match=word):
            model.generate_until([request("p", options)])
    with pytest.raises(EvaluationError, match="64 new tokens and the context is 64"):
        model.generate_until([request("p", {"max_gen_toks": 64})])


def test_what_is_too_long_is_cut_from_the_left_and_said():
    """As lm-eval's models: prompts to what the new tokens leave, contexts to one token more."""
    engine = LetterEngine(context=16)
    model = EngineModel(engine)
    with pytest.warns(UserWarning, match="2 requests were longer than the context of 16"):
        found = model.generate_until(
            [request(text, GREEDY) for text in ("x" * 8 + "abcdefghijkl", "short", "y" * 17, "")]
        )
    assert [text.partition("|")[0] for text in found] == ["abcdefghijkl", "short", "y" * 12, "\x01"]
    logp = engine.table - np.log(np.exp(engine.table).sum(-1, keepdims=True))
    with pytest.warns(UserWarning, match="1 requests"):
        (total, _), _ = model.loglikelihood([request("z" * 30 + "a", "b" * 16), request("a", "b")])
    want = logp[ord("a"), ord("b")] + 15 * logp[ord("b"), ord("b")]
    assert total == pytest.approx(want, rel=1e-5)


def test_tasks_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"lm_eval.*amx-tvm\[tasks\]"):
        run_tasks(LetterEngine(), ["arc_easy"])


def test_tasks_need_the_packages_of_their_own(monkeypatch, tmp_path):
    """As lm-eval's IFEval, whose module imports langdetect when the task is loaded."""
    for name, text in {
        "__init__.py": "def simple_evaluate(**given): import langdetect_of_the_task",
        "api/__init__.py": "",
        "api/model.py": "class LM: pass",
    }.items():
        (tmp_path / "lm_eval" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lm_eval" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)  # so that the test's own goes at its end
        del sys.modules[name]
    with pytest.raises(EvaluationError, match="ifeval need what.*'langdetect_of_the_task'"):
        run_tasks(LetterEngine(), ["ifeval"])


def test_evaluation_imports_no_torch_and_no_compiler():
    code = (
        "import sys, amx_tvm.evaluation, amx_tvm.evaluation.harness\n"
        "bad = {'torch', 'tvm', 'relax_passes', 'amx_tvm.compiler'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_task_of_lm_eval(tmp_path):
    """A multiple-choice task of our own, from a file, through the package itself."""
    pytest.importorskip("lm_eval", reason="the lm-eval package is an option")
    from lm_eval.api.task import ConfigurableTask

    engine = LetterEngine(context=32)
    letters = engine.table[ord("b"), ord("a") : ord("z") + 1]
    best, worst = (chr(int(n) + ord("a")) for n in (letters.argmax(), letters.argmin()))
    lines = [{"question": "ab", "choices": [worst, best], "answer": n} for n in (1, 1, 1, 0)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = ConfigurableTask(
        config={
            "task": "letters",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
    )
    results = run_tasks(engine, [task], bootstrap_iters=0)
    assert results["letters"]["acc,none"] == 0.75
