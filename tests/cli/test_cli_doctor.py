"""`amx-tvm doctor` and `--version`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from amx_tvm.artifact.manifest import SCHEMA
from amx_tvm.version import TVM, TVM_FFI, __version__

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "amx_tvm", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def look(**environment):
    ended = run("doctor", "--json", **environment)
    answer = json.loads(ended.stdout)
    assert ended.returncode == (0 if answer["fine"] else 1) and not ended.stderr
    return answer["fine"], {finding["name"]: finding for finding in answer["findings"]}


def test_this_machine_is_fine():
    fine, findings = look()
    assert fine
    assert findings["apache-tvm"]["found"] == TVM
    assert findings["apache-tvm-ffi"]["found"] == TVM_FFI


def test_every_extra_is_named():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", table, re.MULTILINE)) - {
        "dev",
        "docs",
        "browser",
        "cuda",
        "all",
    }
    assert {f"[{extra}]" for extra in extras} == {name for name in look()[1] if name[0] == "["}


@pytest.mark.parametrize("where", [{"CXX": "no-such-compiler"}, {"PATH": "/nowhere", "CXX": ""}])
def test_a_missing_compiler_is_told_with_the_way_out(where):
    fine, findings = look(**where)
    assert not fine
    assert not findings["C compiler"]["fine"] and "CXX" in findings["C compiler"]["remedy"]


def test_what_is_missing_comes_with_its_use_in_text():
    ended = run("doctor", CXX="no-such-compiler")
    assert ended.returncode == 1
    lines = ended.stdout.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("no  C compiler"))
    assert "for compiling" in lines[at + 1] and "no-such-compiler" in lines[at + 2]


def test_versions():
    ended = run("--version")
    packages = f"amx_tvm {__version__}, tvm {TVM}, tvm_ffi {TVM_FFI}"
    assert ended.stdout == f"{packages}, artifacts of schema {SCHEMA}\n"
