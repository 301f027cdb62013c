from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from amx_tvm.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    """The toy language model with a chat template."""
    import toy_artifact

    path = tmp_path_factory.mktemp("cli") / "artifact"
    shutil.copytree(toy_artifact.shared(tmp_path_factory), path)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process; return exit code, stdout, stderr."""

    def call(*arguments, stdin=None):
        if stdin is not None:
            import io

            monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        done = capsys.readouterr()
        return caught.value.code, done.out, done.err

    return call
