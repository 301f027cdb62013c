"""The cache of few bits in an engine on the GPU that is here, beside the same engine in float16."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import amx_tvm  # noqa: E402
from amx_tvm.runtime import session  # noqa: E402
from tests.models import tiny  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
TARGET = "cuda"
COUNT, FIRST = 300, 120  # tokens of a text, and of its prompt: pages have 64, the newest are 48
SIZES = {"head_dim": 64, "max_position_embeddings": 512}
WINDOW = {"sliding_window": 90, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "gemma2": ("Gemma2Config", {**WINDOW, "attn_logit_softcapping": 5.0}),
}
IDS, OTHERS = np.random.default_rng(2).integers(3, tiny.VOCAB, (2, COUNT)).tolist()
PUSHED = 60  # tokens behind which none in front of them are among the newest
SAME = 5e-3  # what other kernels and other sums of float16 change
MORE = 1.5  # times the largest error of plain decoding, from the first token on, of other ways


def error(got, expected) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=sorted(MODELS))
def made(request, tmp_path_factory):
    """Engines by what their cache holds, the logits of one pass, and plain decoding's errors."""
    name, more = MODELS[request.param]
    place = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.CASES, "packed", (name, {**SIZES, **more}))
        model = tiny.make("packed")
    with torch.no_grad():
        for layer in model.model.layers:  # scores that the rounding of a key does not decide
            layer.self_attn.q_proj.weight.mul_(0.15)
    tiny.save(model, place / "model")
    engines = {}
    for kind in ("float16", "amxfp4"):
        asked = None if kind == "float16" else kind  # what GPUs do by themselves
        path = amx_tvm.compile(place / "model", TARGET, output=place / kind, kv_cache=asked).path
        engines[kind] = amx_tvm.load(path, max_sequences=12, kv_tokens=4096)
    exact = engines["float16"].logits(IDS)
    return engines, exact, {kind: decoding(engine, exact) for kind, engine in engines.items()}


def decoding(engine, exact: np.ndarray) -> float:
    with engine.sequence() as story:
        return max(error(story.append([IDS[i]]), exact[i]) for i in range(COUNT))


def bound(plain: float) -> float:
    return max(SAME, MORE * plain)


def test_rounding_is_seen_and_small(made):
    _, _, plain = made
    print(plain)
    assert plain["float16"] < SAME < plain["amxfp4"] < 0.2


@pytest.mark.parametrize("kind", ["float16", "amxfp4"])
def test_forks_at_any_token(made, kind):
    """A fork is what a sequence is that had other tokens and lost them: it reads its own alone.

    Neither has a token among the newest, where plain decoding has 48 in 16 bits: from float16's
    logits both differ by more than that, on CPUs up to 1.6 times.
    """
    engine, exact = made[0][kind], made[1]
    worst = dict.fromkeys(("one", "several", "child and parent", "of float16"), 0.0)
    with engine.sequence() as story:
        story.append(IDS[:FIRST])
        for i in range(FIRST, COUNT - 8):
            story.append([IDS[i]])
        grown = engine.sequence()
        grown.append(IDS[:FIRST])
        for position in (*range(1, 70), *range(70, len(story) - PUSHED, 7)):
            if position < FIRST:  # of as many rows as the story's prompt, so with its kernels
                twin = engine.sequence()
                twin.append(IDS[:position] + OTHERS[position:FIRST])
            else:
                for token in IDS[len(grown) : position]:
                    grown.append([token])
                twin = grown.fork()
            twin.append(OTHERS[:PUSHED])
            twin.rollback(len(twin) - position)
            several = IDS[position : position + 5]
            with twin, twin.fork() as twins, story.fork(position) as one:
                with story.fork(position) as more:
                    found, expected = (s.append(several[:1]) for s in (one, twin))
                    worst["one"] = max(worst["one"], error(found, expected))
                    away = error(found, exact[position])
                    worst["of float16"] = max(worst["of float16"], away)
                    found, expected = (s.append(several) for s in (more, twins))
                    worst["several"] = max(worst["several"], error(found, expected))
        grown.close()
        with story.fork() as child:
            ids = IDS[len(story) :]
            for token in ids:
                both = np.asarray(child.append([token])), np.asarray(story.append([token]))
                worst["child and parent"] = max(worst["child and parent"], error(*both))
    print(kind, worst)
    away = worst.pop("of float16")
    assert max(worst.values()) < SAME, worst
    assert kind != "float16" or away < SAME


@pytest.mark.parametrize("kind", ["float16", "amxfp4"])
def test_rollbacks(made, kind):
    engine, exact, plain = made[0][kind], made[1], made[2][kind]
    found = []
    with engine.sequence() as story:
        story.append(IDS[:FIRST])
        for back, again in ((1, 2), (50, 60), (64, 64), (130, 3), (2, 120), (120, 130), (170, 40)):
            story.rollback(min(back, len(story) - 1))
            start = len(story)
            story.append(IDS[start : start + again - 1])
            end = len(story)
            found.append(error(story.append([IDS[end]]), exact[end]))
        assert story.tokens == IDS[: len(story)]
    print(kind, found)
    assert max(found) < bound(plain)


@pytest.mark.parametrize("kind", ["float16", "amxfp4"])
def test_rows_of_a_step_are_each_sequences_own(made, kind):
    engine, exact, plain = made[0][kind], made[1], made[2][kind]
    with engine.sequence() as story:
        for start in range(0, 250, 25):
            story.append(IDS[start : start + 25])
        forks = [story.fork(p) for p in (1, 4, 5, 47, 48, 63, 64, 65, 130, 249)]
        again = [story.fork(len(f)) for f in forks[:1]]
        rows = session.decode_batch(forks, [IDS[len(f)] for f in forks])
        errors = [error(row, exact[len(f) - 1]) for row, f in zip(rows, forks, strict=True)]
        alone = again[0].append([IDS[1]])
        for sequence in (*forks, *again):
            sequence.close()
    print(kind, errors)
    assert error(rows[0], alone) < SAME and max(errors) < bound(plain)


@pytest.mark.parametrize("kind", ["float16", "amxfp4"])
def test_a_kept_prefix_is_a_fork(made, kind):
    engine, exact, plain = made[0][kind], made[1], made[2][kind]
    scheduler = engine.scheduler(keep=3)

    def ask(prompt: list[int]):
        options = {"max_new_tokens": 20, "ignore_eos": True, "logprobs": 20}
        handle = scheduler.add(engine.request(prompt, **options))
        while scheduler.step():
            pass
        return handle.result

    first, second = engine.call(lambda: [ask(IDS[:200]), ask(IDS[:180] + IDS[180:260])])
    assert first.timings.prefill_tokens == 200 and second.timings.prefill_tokens < 80
    for result, at in ((first, 199), (second, 259)):
        told = result.logprobs[0]
        found = np.full(tiny.VOCAB, np.nan)
        for token, logprob in told.top:
            found[token] = logprob
        given = ~np.isnan(found)
        wanted = exact[at][given] - exact[at][given].mean()
        print(kind, at, error(found[given] - found[given].mean(), wanted))
        assert given.sum() >= 20
        assert error(found[given] - found[given].mean(), wanted) < bound(plain)
