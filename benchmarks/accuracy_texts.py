"""Texts for accuracy figures, all from packages of the development environment.

    opticks      Newton's Opticks (1704), in the apache-tvm-ffi wheel: English prose, optics
    manual       the Python language reference (`pydoc_data.topics`): a technical manual
    calibration  docstrings of SciPy, PyTorch, SymPy, NetworkX and Hypothesis, licences, package
                 descriptions, Python source: nothing of the two test texts

    python benchmarks/accuracy_texts.py dist/texts

writes opticks.txt, manual.txt and calibration.jsonl for the command line; the test texts without
the part that is skipped. Versions of the packages change the calibration text a little and the
figures within their noise.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

START = 20000  # characters of each test text that are skipped
FOLDERS = (
    "scipy/stats",
    "scipy/optimize",
    "torch/nn",
    "torch/optim",
    "sympy/core",
    "sympy/solvers",
    "networkx/algorithms",
    "hypothesis",
)
DOCUMENTS, LONGEST, SHORTEST = 25, 4000, 1000  # a folder's docstrings; characters of each
SOURCES = ("heapq", "statistics", "textwrap", "json.decoder")


def opticks() -> str:
    """Newton's Opticks from character 20000."""
    path = package("tvm_ffi") / "3rdparty/libbacktrace/Isaac.Newton-Opticks.txt"
    return path.read_text(encoding="utf-8", errors="replace")[START:]


def manual() -> str:
    """The Python language reference from character 20000, topics in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[START:]


def calibration() -> list[str]:
    """Documents of the calibration text, about 120 k tokens."""
    documents = []
    for folder in FOLDERS:
        name, _, inner = folder.partition("/")
        found = list(docstrings(package(name) / inner))
        step = max(1, len(found) // DOCUMENTS)
        documents += [text[:LONGEST] for text in found[::step][:DOCUMENTS]]
    for name in ("matplotlib", "scipy", "fonttools", "tqdm"):
        files = distribution(name).files or []
        wanted = [f for f in files if f.name.upper().startswith(("LICENSE", "METADATA"))]
        for file in sorted(wanted, key=str)[:2]:
            documents.append(file.read_text()[:12000])
    for name in SOURCES:
        spec = find_spec(name)
        documents.append(Path(spec.origin).read_text(encoding="utf-8")[:8000])
    return documents


def docstrings(root: Path) -> Iterator[str]:
    """Long docstrings of a package, in the order of its files."""
    for path in sorted(root.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node, clean=False)
                if text and len(text) >= SHORTEST:
                    yield inspect.cleandoc(text)


def package(name: str) -> Path:
    """Directory of an installed package, which is not imported."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"the package {name} is not installed; it carries a text of this benchmark"
        )
    return Path(spec.submodule_search_locations[0])


def write(directory: str) -> None:
    """Write all three texts into a directory."""
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    (place / "opticks.txt").write_text(opticks(), encoding="utf-8")
    (place / "manual.txt").write_text(manual(), encoding="utf-8")
    lines = "".join(json.dumps({"text": document}) + "\n" for document in calibration())
    (place / "calibration.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1] if len(sys.argv) > 1 else "dist/texts")
