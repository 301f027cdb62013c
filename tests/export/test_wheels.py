"""Wheels of others: what is unpacked stays in its folder."""

from __future__ import annotations

import zipfile

import pytest

from amx_tvm.errors import ArtifactError
from amx_tvm.exporting import wheels

NAME = f"apache_tvm_ffi-{wheels.PACKAGES['apache-tvm-ffi']}-py3-none-manylinux_2_28_aarch64.whl"


def unpack(tmp_path):
    wheels.extract(
        "apache-tvm-ffi",
        "aarch64",
        tmp_path / "one" / "two",
        lambda name: name.startswith("tvm_ffi/"),
        wheels=tmp_path,
    )


@pytest.mark.parametrize("name", ["tvm_ffi/../../../evil.txt", "tvm_ffi/a/../../../b"])
def test_a_wheel_that_leads_out(tmp_path, name):
    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        archive.writestr(name, "x")
        archive.writestr("tvm_ffi/good", "x")
    unpack(tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {NAME, "good"}


@pytest.mark.parametrize("kind", ["encrypted", "broken lzma", "broken bzip2", "broken deflate"])
def test_a_wheel_that_cannot_be_unpacked(tmp_path, kind):
    method = {"broken lzma": zipfile.ZIP_LZMA, "broken bzip2": zipfile.ZIP_BZIP2}.get(kind, 8)
    with zipfile.ZipFile(tmp_path / NAME, "w", method) as archive:
        archive.writestr("tvm_ffi/text", "some text, and more of it" * 20)
    data = bytearray((tmp_path / NAME).read_bytes())
    if kind == "encrypted":
        data[6] |= 1  # flags of the file
        data[data.index(b"PK\1\2") + 8] |= 1  # and of its entry in the directory
    else:
        start = 30 + len("tvm_ffi/text") + (9 if method == zipfile.ZIP_LZMA else 4)
        data[start : start + 12] = bytes([255] * 12) if method != 8 else bytes(12)
    (tmp_path / NAME).write_bytes(data)
    with pytest.raises(ArtifactError, match="cannot be read as a wheel"):
        unpack(tmp_path)


def test_a_wheel_that_is_none_or_grows(tmp_path, monkeypatch):
    (tmp_path / NAME).write_bytes(b"PK\x03\x04 no wheel")
    with pytest.raises(ArtifactError, match="cannot be read as a wheel"):
        unpack(tmp_path)
    monkeypatch.setattr(wheels, "_UNPACKED_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tvm_ffi/zeros", bytes(10_000))
    with pytest.raises(ArtifactError, match="unpacks to more than"):
        unpack(tmp_path)
