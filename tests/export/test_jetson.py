"""A Jetson bundle: an aarch64 library with machine code for sm_87, read from their ELF headers."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from export_tools import skip_without

import amx_tvm
from amx_tvm.targets.cuda.toolchain import find_nvcc

EM_AARCH64, EM_CUDA = 183, 190


@pytest.mark.slow
def test_library_and_cubin(tiny_model, tmp_path):
    skip_without("aarch64-linux-gnu-g++")
    if find_nvcc() is None:
        pytest.importorskip("cuda.bindings.nvrtc")
    bundle = amx_tvm.export(
        tiny_model, "nvidia/jetson-agx-orin-64gb", tmp_path / "orin", runtimes=()
    )
    data = (Path(bundle.path) / "lib.so").read_bytes()
    assert struct.unpack_from("<H", data, 18)[0] == EM_AARCH64
    start = data.index(b"\x7fELF", 1)
    assert struct.unpack_from("<H", data, start + 18)[0] == EM_CUDA
    assert struct.unpack_from("<I", data, start + 48)[0] >> 8 & 0xFF == 87
