"""What the tests of this folder share."""

from __future__ import annotations

import shutil

import pytest


def skip_without(*tools):
    """Skip where a program is not installed."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
