"""A combination of packages that crashes is refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WRONG = """
import importlib.metadata as metadata
real = metadata.version
metadata.version = lambda name: "0.1.99" if name == "apache-tvm-ffi" else real(name)
"""


def run(tmp_path, *arguments):
    (tmp_path / "sitecustomize.py").write_text(WRONG)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), root))}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def test_the_command_line_prints_one_line(tmp_path):
    result = run(tmp_path, "-m", "amx_tvm", "devices")
    assert result.returncode == 2
    assert result.stderr.startswith("error: apache-tvm-ffi 0.1.99 is installed")
    assert "pip install apache-tvm-ffi==" in result.stderr and result.stderr.count("\n") == 1


def test_the_library_raises(tmp_path):
    result = run(tmp_path, "-c", "import amx_tvm")
    assert result.returncode == 1 and "AmxError: apache-tvm-ffi 0.1.99" in result.stderr
