"""An artifact that is replaced while it is loaded comes out as the old one or the new one."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest

from amx_tvm.artifact import ArtifactWriter, Manifest, open_parameters
from amx_tvm.artifact.occupant import Occupant, one_directory
from amx_tvm.errors import ArtifactError
from amx_tvm.runtime import load, loading


def write(source, output, factor):
    """Write an artifact again, its weights times a factor."""
    manifest = Manifest.load(source)
    arrays = open_parameters(source, manifest.parameters)
    with ArtifactWriter(output, overwrite=True) as writer:
        for name in manifest.parameters.order:
            writer.parameters.add(name, arrays[name] * np.float32(factor))
        for name in (manifest.library.file, *manifest.files):
            os.link(source / name, writer.path(name))
        parameters = writer.parameters.finish(manifest.parameters.order)
        writer.finish(dataclasses.replace(manifest, parameters=parameters))


@pytest.mark.parametrize("verify", [False, "quick"])
@pytest.mark.parametrize("moment", ["after the manifest", "after the checks", "at the end"])
def test_files_of_two_artifacts_are_never_mixed(artifact, tmp_path, monkeypatch, verify, moment):
    place = tmp_path / "out"
    write(artifact, place, 1.0)
    old = load(place, threads=1).logits(range(1, 20))
    replaced = []

    def strike(function):
        def run(*given, **named):
            made = function(*given, **named)
            if not replaced:
                replaced.append(True)
                write(artifact, place, -1.0)
            return made

        return run

    if moment == "after the manifest":
        monkeypatch.setattr(Manifest, "load", strike(Manifest.load))
    elif moment == "after the checks":
        monkeypatch.setattr(loading, "verify_artifact", strike(loading.verify_artifact))
    else:
        monkeypatch.setattr(loading, "Engine", strike(loading.Engine))
    found = load(place, threads=1, verify=verify).logits(range(1, 20))
    monkeypatch.undo()
    new = load(place, threads=1).logits(range(1, 20))
    assert replaced and not np.array_equal(old, new)
    np.testing.assert_array_equal(found, new)


def test_what_is_damaged_is_refused_at_once(artifact, tmp_path):
    place = tmp_path / "out"
    write(artifact, place, 1.0)
    shard = next((place / "params").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ArtifactError, match="is damaged between"):
        load(place)
    with pytest.raises(ArtifactError):
        load(tmp_path / "missing")


def test_an_occupant_keeps_its_identity(tmp_path):
    place = tmp_path / "a"
    with Occupant(place) as nobody:
        place.mkdir()
        assert not nobody.replaced
    with Occupant(place) as somebody:
        assert not somebody.replaced
        place.rmdir()
        assert somebody.replaced
        place.mkdir()
        assert somebody.replaced


def test_what_is_replaced_without_end_is_no_damaged_artifact(tmp_path):
    """A writer that is always faster than the reader: neither a mixture nor a wrong reason."""

    @one_directory
    def read(path, damaged):
        path.rename(tmp_path / "old")
        path.mkdir()
        (tmp_path / "old").rmdir()
        if damaged:
            raise ArtifactError("damaged")

    (tmp_path / "a").mkdir()
    for damaged in (False, True):
        with pytest.raises(ArtifactError, match="a was replaced 20 times while it was read"):
            read(tmp_path / "a", damaged)
