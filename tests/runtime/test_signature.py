"""Signed artifacts: only the key's owner's, and only as they were."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from amx_tvm.artifact import (
    ArtifactWriter,
    Manifest,
    TargetRecord,
    Versions,
    signature,
    verify_artifact,
)
from amx_tvm.errors import ArtifactError


def write(place, key=None):
    """An artifact of a compiled function, whose library is never loaded here."""
    with ArtifactWriter(place, key=signature.private_key(key)) as writer:
        writer.path("lib.so").write_bytes(b"library")
        writer.parameters.add("weight", np.arange(64, dtype=np.float32))
        writer.finish(
            Manifest(
                versions=Versions("0", "0", "0"),
                target=TargetRecord("llvm", "llvm", ""),
                library=writer.library(),
                parameters=writer.parameters.finish(),
                model={},
                kind="function",
            )
        )
    return place


def test_a_signed_artifact_is_taken(tmp_path, key_pair):
    private, public = key_pair("own")
    place = write(tmp_path / "signed", private)
    assert verify_artifact(place, False, require_signature=public).kind == "function"
    assert verify_artifact(place).kind == "function"


def test_what_is_not_signed_is_refused(tmp_path, key_pair):
    private, public = key_pair("own")
    _, other = key_pair("other")
    with pytest.raises(ArtifactError, match="has no manifest.sig"):
        verify_artifact(write(tmp_path / "plain"), require_signature=public)
    place = write(tmp_path / "signed", private)
    with pytest.raises(ArtifactError, match="another key or for another artifact"):
        verify_artifact(place, require_signature=other)
    # A forged weight with a checksum to match passes "quick", but not the signature's SHA-256.
    manifest = Manifest.load(place)
    shard = place / manifest.parameters.shards[0].file
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ArtifactError, match="is damaged: its SHA-256"):
        verify_artifact(place, False, require_signature=public)
    dataclasses.replace(manifest, functions=["other"]).save(place)
    with pytest.raises(ArtifactError, match="for another artifact"):
        verify_artifact(place, require_signature=public)


def test_keys_that_are_none(tmp_path, key_pair):
    private, public = key_pair("own")
    place = write(tmp_path / "signed", private)
    for path, words in ((private, "no public key"), (tmp_path / "x", "does not exist")):
        with pytest.raises(ArtifactError, match=words):
            verify_artifact(place, require_signature=path)
    with pytest.raises(ArtifactError, match="no private key"):
        write(tmp_path / "again", public)
    assert not (tmp_path / "again").exists()
