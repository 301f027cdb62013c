"""What the tests of this folder share."""

from __future__ import annotations

import shutil

import pytest


def skip_without(*tools):
    """Skip where a program is not installed."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")


def machine_code(data):
    """Return e_machine of an ELF file: 62 is x86-64, 183 aarch64, 243 RISC-V."""
    assert data[:4] == b"\x7fELF"
    return int.from_bytes(data[18:20], "little")
