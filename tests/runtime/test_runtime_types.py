"""What editors and type checkers are told of the options, and what a prompt shows of objects."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from amx_tvm.runtime import Limits, Sampling, options

ROOT = Path(__file__).parents[2]
PROGRAM = """
import amx_tvm

artifact = amx_tvm.compile("model", target="llvm", quantization="amxfp4", overwrite=True)
engine = amx_tvm.load(artifact.path, threads=2)
assert isinstance(engine, amx_tvm.Engine)
with engine.sequence() as story:
    text: str = engine.generate("a", 8, temperature=0.5, stop=["b"], sequence=story).text
for piece in engine.stream("a", max_new_tokens=2, top_k=3):
    print(piece + text)
print([result.token_ids[0] + 1 for result in engine.generate_batch(["a", "b"], seed=1)])
request = engine.request("a", max_new_tokens=8)
amx_tvm.export(artifact.path, "x86-64-v3", "bundle")
"""
WRONG = """
amx_tvm.compile("model", quantisation="amxfp4")
amx_tvm.load("model", thread=2)
engine.generate("a", temprature=0.5)
engine.stream("a", top_k="3")
engine.generate_batch(["a"], sequence=None)
engine.request("a", max_tokens=8)
"""


def test_the_types_name_every_option():
    """They are written down twice, since a checker reads text."""
    known = {entry.name for kind in (Sampling, Limits) for entry in fields(kind)}
    assert set(options.OptionsBesides.__annotations__) | {"max_new_tokens"} == known
    both = options.RequestOptions.__annotations__, options.GenerateOptions.__annotations__
    assert [set(found) - known for found in both] == [
        set(),
        {"sequence", "adapter", "images", "mask"},
    ]


@pytest.mark.slow
def test_mypy_finds_a_wrong_option(tmp_path):
    """With --strict: nothing in a right program, one error a line of a wrong one."""
    file = tmp_path / "program.py"

    def check(text):
        file.write_text(text)
        command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
        command += ["--cache-dir", str(tmp_path / "cache"), str(file)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout

    assert "Success" in check(PROGRAM)
    found = check(PROGRAM + WRONG)
    first = PROGRAM.count("\n") + 2
    for number in range(first, first + 6):
        assert f"program.py:{number}: error" in found, found


def test_objects_are_shown_in_a_line(engine):
    shown = repr(engine)
    assert shown.startswith("<Engine ") and "on cpu, context" in shown and len(shown) < 100
    with engine.sequence() as sequence:
        sequence.append([1, 2])
        assert repr(sequence) == "<Sequence of 2 tokens>"
    assert repr(sequence) == "<Sequence of 2 tokens, closed>"
