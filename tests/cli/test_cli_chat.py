"""`amx-tvm chat`: its commands, and its editor in a pseudo-terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

import amx_tvm.runtime
from amx_tvm.cli import line_input

# The command line at a terminal of its own, with a sampler that takes its time.
SLOW = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import amx_tvm.runtime.sampler as sampler
from amx_tvm.cli import main
old = sampler.Sampler.__call__
sampler.Sampler.__call__ = lambda *a: (time.sleep(0.1), old(*a))[1]
main(sys.argv[1:])
"""


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, *arguments, state):
        self.seen = b""
        self._end, inner = pty.openpty()
        environment = {
            **os.environ,
            "XDG_STATE_HOME": str(state),
            "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody answers where the cursor is
            "TERM": "xterm",
        }
        command = [sys.executable, "-c", SLOW, "chat", *map(str, arguments)]
        streams = {"stdin": inner, "stdout": inner, "stderr": inner}
        self._process = subprocess.Popen(
            command, env=environment, start_new_session=True, **streams
        )
        os.close(inner)

    def type(self, text):
        os.write(self._end, text.encode())

    def until(self, text):
        """Read up to a text and return what came before it."""
        wanted, end = text.encode(), time.monotonic() + 60
        while wanted not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self._end], [], [], 1)[0]:
                self.seen += os.read(self._end, 4096)
        before, _, self.seen = self.seen.partition(wanted)
        return before.decode()

    def ready(self):
        """Wait until the editor takes keys, as it tells the terminal."""
        self.until("\x1b[?2004h")

    def answer(self):
        """Wait until a part of an answer is there: the editor has left, and text follows."""
        self.until("\x1b[?2004l")
        end = time.monotonic() + 60
        while not re.search(r"\w", re.sub(r"\x1b\[[\d;?]*\w", "", self.seen.decode())):
            assert time.monotonic() < end, self.seen
            if select.select([self._end], [], [], 1)[0]:
                self.seen += os.read(self._end, 4096)

    def leave(self):
        self.type("/exit\r")
        while True:  # a full terminal would keep the process from its end
            try:
                if not os.read(self._end, 4096):
                    break
            except OSError:
                break
        assert self._process.wait(60) == 0
        os.close(self._end)


def messages(path):
    return [(m["role"], m["content"]) for m in json.loads(path.read_text())["messages"]]


def test_the_editor(artifact, tmp_path):
    """Pasted and typed lines, Ctrl-C at both times, and history over runs."""
    state, file = tmp_path / "state", tmp_path / "said.json"
    chat = Terminal(artifact, "-n", "100000", state=state)
    chat.until("/help shows")
    chat.ready()
    chat.type("\x1b[200~the cat\nsat\x1b[201~")  # a terminal's marks of what is pasted
    chat.type("\\\ron\x1b\rit\r")  # Enter behind a backslash, Alt-Enter
    chat.answer()
    chat.type("\x03")
    chat.until("interrupted]")
    chat.ready()
    chat.type("half a line\x03")
    chat.until("the conversation goes on")
    chat.type(f"/save {file}\r")
    chat.until("2 messages saved")
    chat.leave()
    [(_, said), (role, answer)] = messages(file)
    assert said == "the cat\nsat\non\nit" and role == "assistant" and answer
    kept = state / "amx-tvm" / "chat_history"
    assert kept.stat().st_mode & 0o777 == 0o600

    chat = Terminal(artifact, "-n", "2", "-q", state=state)
    chat.ready()
    chat.type("\x1b[A\x1b[A")  # up: /exit, then /save
    chat.until("/save")
    chat.type("\x03")
    chat.until("the conversation goes on")
    chat.leave()


def test_commands(run, artifact, tmp_path):
    file = tmp_path / "said.json"
    lines = (
        f"hello\n/system be brief\nagain\n/save {file}\n/reset\n/load {file}\n/regenerate\n"
        "/regenerate 1.5\n/system\n/system -\n/help\n"
    )
    code, out, err = run("chat", artifact, "-n", 4, "--seed", 3, stdin=lines)
    engine = amx_tvm.runtime.load(artifact)
    first = engine.generate("[user]hello\n[assistant]", 4, seed=3).text
    prompt = f"[system]be brief\n[user]hello\n[assistant]{first}\n[user]again\n[assistant]"
    second = engine.generate(prompt, 4).text
    drawn = engine.generate(prompt, 4, seed=5, temperature=1.5).text
    assert code == 0 and out == f"{first}\n{second}\n{second}\n{drawn}\n"
    assert messages(file) == [
        ("system", "be brief"), ("user", "hello"), ("assistant", first),
        ("user", "again"), ("assistant", second),
    ]  # fmt: skip
    assert "no terminal" in err and "greedy" in err and "system message: none" in err
    assert err.count("system message: be brief") == 2 and "/regenerate" in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/regenerate", "nothing has been asked"),
        ("/save", "which file"),
        ("/save MINE", "no saved conversation"),
        ("/save MINE/x", "cannot write"),
        ("/load MINE", "name a file that /save made"),
        ("/load ~nobodyatall/x", "no such user"),
        ("/load NONE", "does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, artifact, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MINE").write_text('{"messages": [{"role": "user"}]}')
    code, out, err = run("chat", artifact, "-q", stdin=line + "\n")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["MINE"]


def test_a_place_without_history_is_said(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    history = line_input._history()
    history.append_string("x")
    assert "no history is kept" in capsys.readouterr().err
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    line_input._history().append_string("half \ud800")
    line_input._history().append_string("two\nlines")
    assert list(line_input._history().load_history_strings()) == ["two\nlines", "half ?"]
