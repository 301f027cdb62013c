"""Every file operation of commands killed and failed in turn: the old one or the new one."""

from __future__ import annotations

import json
import shutil

import every_operation
import pytest


@pytest.mark.skipif(not shutil.which("cc"), reason="the counting library needs a C compiler")
def test_whatever_fails_the_old_or_the_new_is_there(tmp_path):
    """Those that need no compiler; the script takes the others too, and every operation."""
    lines = every_operation.preloaded(["journal", "quantize", "--every", "3"], tmp_path)
    found = [json.loads(line) for line in lines.splitlines()]
    assert [(one["command"], one["way"]) for one in found] == [
        (command, way) for command in ("journal", "quantize") for way in every_operation.WAYS[1:]
    ]
    assert all(one["struck"] > 5 for one in found)
    assert [one for one in found if one["wrong"]] == []
