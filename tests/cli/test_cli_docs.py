"""What the documentation says to type: every command parses, every snippet runs.

A fenced block of ``python`` or ``sh`` is run, in the order of its page, in a folder that has an
artifact at dist/smollm2: a toy one, for `make test`. Behind ``<!-- slow -->`` it is run by `make
test-all` only, where dist/smollm2 is what the page itself makes; behind ``<!-- skip: REASON -->``
it is not run.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import typer

from amx_tvm.cli import main
from amx_tvm.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:<!-- (slow|skip: [^>]+) -->\n)?^```(python|sh)\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"^ *(?:\$ )?(amx-tvm .*)$", re.M)


def words_of(line):
    """Split a line as a shell does, up to a pipe; comments are no part of it."""
    words = shlex.split(line, comments=True)
    return words[: words.index("|")] if "|" in words else words


def commands(text):
    text = text.replace("\\\n", " ")
    return [words_of(line)[1:] for line in COMMAND.findall(text)]


def documented():
    """Return every command of every page, and the examples of every command's help."""
    found = [(page.name, words) for page in PAGES for words in commands(page.read_text("utf-8"))]
    for name, command in leaves(typer.main.get_command(app)):
        found += [(name, words) for words in commands(command.epilog or "")]
    return found


def leaves(command, name="amx-tvm"):
    if not hasattr(command, "commands"):
        return [(name, command)]
    below = command.commands.items()
    return [leaf for part, one in below for leaf in leaves(one, f"{name} {part}")]


def test_every_command_parses():
    wrong, ours = [], typer.main.get_command(app)
    for place, words in documented():
        if words[0].isupper():  # COMMAND
            continue
        command, name = ours, "amx-tvm"
        try:
            while hasattr(command, "commands") and words and words[0] in command.commands:
                name, command, words = words[0], command.commands[words[0]], words[1:]
            if "--help" not in words and words != ["--version"]:
                assert "--install-completion" in words or command.make_context(name, list(words))
        except Exception as error:  # click's have no common class here
            wrong.append(f"{place}: {name} {' '.join(words)}: {error!r}")
    assert len(documented()) > 60 and not wrong, "\n".join(wrong)


def snippets(page, slow):
    """Return (language, code) of what is run of a page."""
    if page.name == "lowering.md":  # dumps, of other languages
        return []
    found = FENCE.findall(page.read_text("utf-8"))
    return [(kind, code) for mark, kind, code in found if not mark or (slow and mark == "slow")]


def run(page, slow):
    names = {}
    for kind, code in snippets(page, slow):
        if kind == "python":
            exec(compile(code, str(page), "exec"), names)
            continue
        for words in commands(code):
            with pytest.raises(SystemExit) as ended:
                main(words)
            assert ended.value.code == 0, words


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if snippets(page, False)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_snippets(page, artifact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    os.mkdir("dist")
    os.symlink(artifact, "dist/smollm2")
    run(page, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if len(snippets(page, True)) > len(snippets(page, False))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_slow_snippets(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run(page, slow=True)


def test_every_shell_line_of_a_snippet_is_a_command_of_ours():
    """What else there is (make, scp) stands behind <!-- skip: ... -->, or in an indented block."""
    for page in PAGES:
        for kind, code in snippets(page, True):
            lines = [line for line in code.splitlines() if line.strip()]
            assert kind == "python" or all(COMMAND.match(line) for line in lines), (page, code)


def test_the_site_has_every_page_and_links_lead_somewhere():
    """`make docs` finds more; this needs nothing installed."""
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"(?:: |- )([\w/-]+\.md)$", navigation, re.M)
    pages = sorted((ROOT / "docs").rglob("*.md"))
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in pages)
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+\.md)", page.read_text("utf-8")):
            assert (page.parent / link).is_file(), (page, link)
