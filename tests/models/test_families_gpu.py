"""Every registered family on the GPU that is here: scoring, prefill, decode, forks and batches."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402

import amx_tvm  # noqa: E402
from amx_tvm.runtime import session  # noqa: E402

from . import tiny  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CASES = {**tiny.CASES, **tiny.VARIANTS}
LENGTH, FIRST, PREFILLED = 40, 20, 33  # past the window and into a third page
BOUND = 1e-2  # float16 activations
# Texts in which no choice of experts is a tie within float16's rounding; of others any will do.
TEXTS = {"glm4_moe_lite": 3, "deepseek_v3": 4}


def error(got, expected) -> float:
    """Relative difference of rows of logits in norm, the largest of all rows."""
    got, expected = np.atleast_2d(got), np.atleast_2d(expected)
    return float((np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


@pytest.mark.parametrize("family", sorted(CASES))
def test_logits_equal_torch(family, tmp_path):
    if not hasattr(transformers, CASES[family][0]):
        pytest.skip(f"transformers {transformers.__version__} has no {CASES[family][0]}")
    quantization = "mxfp4" if family == "gpt_oss" else "amxfp4"
    model = tiny.make(family)
    directory = tiny.save(model, tmp_path / "model")
    artifact = amx_tvm.compile(directory, "cuda", quantization, tmp_path / "out")
    for module in model.modules():  # which transformers before 5.20 does not read
        if hasattr(module, "limit"):
            module.limit = model.config.swiglu_limit
    tiny.fake_quantize(model, quantization, "int8")
    ids = np.random.default_rng(TEXTS.get(family, 1)).integers(3, tiny.VOCAB, LENGTH).tolist()
    expected = tiny.logits(model, ids)
    engine = amx_tvm.load(artifact.path, device="cuda", max_sequences=4, kv_tokens=512)
    found = {"scoring": error(engine.logits(ids), expected)}
    with engine.sequence() as sequence:
        sequence.append(ids[:FIRST])
        chunk = sequence.append(ids[FIRST:PREFILLED])
        found["second chunk"] = error(chunk, expected[PREFILLED - 1])
        fork = sequence.fork(PREFILLED - 5)
        found["fork"] = error(fork.append(ids[PREFILLED - 5 : PREFILLED]), expected[PREFILLED - 1])
        for i in range(PREFILLED, LENGTH - 3):
            found[f"decode {i}"] = error(sequence.append([ids[i]]), expected[i])
        rows = session.decode_batch([sequence, fork], [ids[LENGTH - 3], ids[PREFILLED]])
        both = expected[[LENGTH - 3, PREFILLED]]
        found["batch"] = error(np.asarray(rows), both)
        fork.close()
    print(family, {name: round(value, 5) for name, value in found.items()})
    assert max(found.values()) < BOUND, found
