"""Temporary files whose place is missing or full: one line that names it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile

import pytest

from amx_tvm.errors import AmxError
from amx_tvm.scratch import scratch


def test_a_folder_is_gone_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyError), scratch("x-") as folder:
        (folder / "file").write_text("x")
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_missing_place_is_named(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/nothing")
    with pytest.raises(AmxError, match="temporary files have no place .*set TMPDIR"):
        with scratch("x-"):
            pass


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("ld: failed")])
def test_a_full_place_is_named_with_what_is_free(tmp_path, monkeypatch, error):
    """Also by a tool that says it in words of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(AmxError, match=f"temporary files: 0 kB are free under {tmp_path};"):
        with scratch("x-"):
            raise error
    assert os.listdir(tmp_path) == []


def test_other_files_and_errors_are_not_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    elsewhere = OSError(errno.ENOSPC, "full", "/somewhere/else")
    for error in (elsewhere, RuntimeError("a defect"), AmxError("a reason")):
        with pytest.raises(type(error)) as caught, scratch("x-"):
            raise error
        assert caught.value is error
