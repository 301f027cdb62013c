"""Every registered family against transformers: prefill, decode, unquantized and in AMXFP4."""

from __future__ import annotations

import numpy as np
import pytest

import amx_tvm
from amx_tvm.models import families

from . import tiny

LENGTH, FIRST, PREFILLED = 40, 20, 33  # two chunks; past the window and into a third page


def test_every_family_has_a_case():
    known = sorted(family.name for family in families() if family.vision is None)
    assert known == sorted(tiny.CASES | tiny.VARIANTS)


@pytest.fixture(scope="module", params=sorted(tiny.CASES))
def saved(request, tmp_path_factory):
    model = tiny.make(request.param)
    return model, tiny.save(model, tmp_path_factory.mktemp(request.param))


def run(artifact, ids):
    """Return the logits of a scoring pass, and of a prefill in two chunks with the rest decoded."""
    engine = amx_tvm.load(artifact.path)
    scored = np.asarray(engine.logits(ids))
    with engine.sequence() as sequence:
        sequence.append(ids[:FIRST])
        rows = [sequence.append(ids[FIRST:PREFILLED])]
        rows += [sequence.append([token]) for token in ids[PREFILLED:]]
    return scored, np.concatenate([np.reshape(row, (1, -1)) for row in rows])


@pytest.mark.parametrize("quantization", ["none", "amxfp4"])
def test_logits_equal_torch(saved, quantization, tmp_path):
    compare(saved, quantization, tmp_path)


# Flags and factors on what the families above have; unquantized, they compute the same.
@pytest.mark.parametrize("variant", sorted(tiny.VARIANTS))
def test_logits_of_variants(variant, tmp_path):
    model = tiny.make(variant)
    compare((model, tiny.save(model, tmp_path)), "amxfp4", tmp_path)


def compare(saved, quantization, tmp_path):
    model, directory = saved
    artifact = amx_tvm.compile(
        directory, quantization=quantization, strict=quantization != "none", output=tmp_path / "out"
    )
    if quantization != "none":
        tiny.fake_quantize(model, quantization, "int8")
    ids = np.random.default_rng(1).integers(3, tiny.VOCAB, LENGTH).tolist()
    expected = tiny.logits(model, ids)
    scored, decoded = run(artifact, ids)
    assert tiny.relative_error(scored, expected) < 1e-4
    assert tiny.relative_error(decoded, expected[PREFILLED - 1 :]) < 1e-4
