"""An engine whose keys and values are in 4.5 bits: everything that a cache can do."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_model import write_model

import amx_tvm
from amx_tvm.artifact.manifest import Manifest
from amx_tvm.cli import main
from amx_tvm.errors import ArtifactError, ModelError
from amx_tvm.runtime import budget

PROMPT = np.random.default_rng(5).integers(1, 300, 150).tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("packed")
    model = write_model(place / "model", head=32)
    output = place / "artifact"
    return amx_tvm.compile(model, "x86-64-v2", output=output, strict=True, kv_cache="amxfp4")


@pytest.fixture(scope="module")
def packed(made):
    return amx_tvm.load(made.path, max_sequences=6, kv_tokens=2048)


def test_one_and_many_give_the_same_text(packed):
    alone = [packed.generate(PROMPT[i:], 12).token_ids for i in range(3)]
    batch = packed.generate_batch([PROMPT[i:] for i in range(3)], max_new_tokens=12)
    assert [result.token_ids for result in batch] == alone


def test_forks_and_rollbacks(packed):
    with packed.sequence() as story:
        story.append(PROMPT)
        child, early = story.fork(), story.fork(20)
        logits = child.append([7])
        np.testing.assert_allclose(story.append([7]), logits, atol=1e-5)
        np.testing.assert_array_equal(early.tokens, PROMPT[:20])
        story.rollback(1)
        np.testing.assert_allclose(story.append([7]), logits, atol=1e-5)
        early.append(PROMPT[20:40])
        free = packed._cache.available_pages()
        child.close()
        early.close()
        assert packed._cache.available_pages() > free
    assert packed._cache.available_pages() == packed._cache.pages


def test_rounding_changes_little(packed):
    chunks = packed.logits(PROMPT)[-1]  # one pass: nothing is read rounded
    with packed.sequence() as story:
        for token in PROMPT:
            logits = story.append([token])
    assert 1e-4 < np.linalg.norm(logits - chunks) / np.linalg.norm(chunks) < 0.3


def test_sizes_are_told_and_counted(made, capsys):
    manifest = Manifest.load(made.path)
    # layers, heads; bytes of k and v; a 64th of the mean's
    assert budget.kv_bytes(manifest) == 2 * 2 * (2 * 18 + 1)
    assert budget.sequence_bytes(manifest) == 2 * 2 * 2 * 52 * 32 * 2
    fixed = budget.fit(manifest, 100 << 20, None, used=10 << 20)
    assert budget.fit(manifest, (100 << 20) + 3 * 26624, None, 10 << 20, sequences=4) == fixed
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", made.path])
    text = " ".join(capsys.readouterr().out.split())
    assert "amxfp4, 0.1 KiB a token, 7255012 tokens a GiB; the newest 48 tokens" in text


def test_a_manifest_of_other_sizes_is_refused(made, tmp_path):
    manifest = Manifest.load(made.path)
    manifest.kv_cache["packed"]["page_bytes"] += 64
    manifest.check()
    engine = amx_tvm.load(made.path)
    engine.manifest.kv_cache["packed"]["page_bytes"] += 64
    with pytest.raises(ArtifactError, match="9472 bytes a page"):
        engine.generate([1, 2], 1)


def test_what_does_not_fit_is_refused_before_any_work(made, tmp_path):
    model = write_model(tmp_path / "model")
    with pytest.raises(ModelError, match="heads of 16 channels cannot be kept as nvfp4"):
        amx_tvm.compile(model, output=tmp_path / "out", kv_cache="nvfp4")
    with pytest.raises(SystemExit, match="2"):
        main(["compile", str(model), "--kv-cache", "int4", "-o", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
