"""What the tests of this folder share."""

from __future__ import annotations

import shutil

import pytest

import amx_tvm
from amx_tvm.errors import ArtifactError


def skip_without(*tools):
    """Skip where a program is not installed."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")


def machine_code(data):
    """Return e_machine of an ELF file: 62 is x86-64, 183 aarch64, 243 RISC-V."""
    assert data[:4] == b"\x7fELF"
    return int.from_bytes(data[18:20], "little")


def export_with_runtime(*arguments, **options):
    """Export; skip where a package of the device is neither installed here nor to be downloaded."""
    try:
        return amx_tvm.export(*arguments, **options)
    except ArtifactError as error:
        if "pip cannot download" in str(error):
            pytest.skip(str(error))
        raise
