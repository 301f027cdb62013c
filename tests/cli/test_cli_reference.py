"""docs/command-line.md names every environment variable that the code reads."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A literal that is looked up, or the value of a constant that is.
READ = re.compile(r'(?:environ(?:\.get\(|\[)|getenv\(|envvar=|VARIABLES? = )\(?("[A-Z_"C, ]+")')
OF_OTHERS = {"TVM_USE_RUNTIME_LIB"}  # set for a child, not read


def test_every_variable_is_documented():
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    table = text.split("## Environment variables")[1]
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", table))
    read = set()
    for folder in ("amx_tvm", "relax_passes", "tuning"):
        for file in (ROOT / folder).rglob("*.py"):
            for found in READ.findall(file.read_text(encoding="utf-8")):
                read |= set(re.findall(r"[A-Z][A-Z_]+", found))
    assert read - OF_OTHERS == documented - {"TMPDIR"}
