"""Misspelled options are refused before TVM is imported, which takes a second and more."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Whatever would import TVM fails here, instead of taking a second.
WITHOUT_TVM = """
import sys
from amx_tvm.cli import main
sys.modules["tvm"] = sys.modules["tvm_ffi"] = None
main(sys.argv[1:])
"""
IMPORTED = """
import sys
import amx_tvm.compiler
print("torch" in sys.modules, "tvm" in sys.modules)
import torch
from amx_tvm.frontends import open_model
print(open_model(torch.nn.Linear(4, 4).eval(), (torch.ones(2, 4),)).kind)
"""
OWN = "import sys, amx_tvm, tvm_ffi; print('torch' in sys.modules)"


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ("compile m --target cudaa", "unknown target 'cudaa', did you mean 'cuda'?"),
        ("compile m --target cuda:sm_91", "CUDA architecture 'sm_91' is not known"),
        ("compile m --target cuda:sm_90a/many", "'many' multiprocessors"),
        ("compile m --quantization amxfp5", "unknown number format 'amxfp5'"),
        ("compile m --quantization amxfp4-w4a4 --strict", "cannot be combined"),
        ("run m --target vulkan", "unknown target 'vulkan'"),
        ("tune m --target lvm", "did you mean 'llvm'?"),
        ("quantize m -o q --quantization fp5", "unknown number format 'fp5'"),
        ("export m -o q --target x86-64-v5", "did you mean 'x86-64-v"),
    ],
)
def test_no_compiler_is_imported_for_it(arguments, problem):
    done = python(WITHOUT_TVM, *arguments.split())
    assert done.returncode == 2 and problem in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_compiler_imports_no_torch_and_takes_its_modules_later():
    done = python(IMPORTED)
    assert done.stdout.split() == ["False", "True", "function"], done.stderr


def test_a_users_own_import_is_left_alone():
    done = python(OWN)
    assert done.stdout.strip() == "True", done.stderr
