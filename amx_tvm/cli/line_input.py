"""Where the messages of a chat come from: an editor in a terminal, or the lines of a file or pipe.

In a terminal a message may have several lines, pasted (a terminal marks what is pasted) or typed
(Alt-Enter, or Enter behind a backslash, breaks a line), and those of earlier runs are a key away.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

Reader = Callable[[], str]  # returns a message; EOFError at the end, KeyboardInterrupt at Ctrl-C
_PROMPT = "> "


def in_terminal() -> bool:
    """Whether somebody sits at both ends."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def lines() -> Reader:
    """Return a reader of standard input, a line a message."""
    return input


def editor(words: Iterable[str]) -> Reader:
    """Return a reader that edits in the terminal.

    Parameters
    ----------
    words : iterable of str
        What Tab completes at the beginning.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    session: PromptSession[str] = PromptSession(
        multiline=True,
        key_bindings=_keys(),
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        history=_history(),
        prompt_continuation="  ",
    )
    return lambda: session.prompt(_PROMPT)


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")  # and Ctrl-J, which is what Enter was before the prompt was there
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def history_file() -> Path:
    """Return where messages of earlier runs are kept."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "amx-tvm" / "chat_history"


def _history() -> History:
    """Return the history on disk, or one of this run alone where there can be none."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        """What a full disk does not take stays in this run."""

        def store_string(self, string: str) -> None:
            with suppress(OSError):
                super().store_string(string)

    file = history_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))  # its owner's alone
    except OSError as error:
        _say_lost(error)
        return InMemoryHistory()
    return Kept(str(file))


def _say_lost(error: OSError) -> None:
    print(f"no history is kept: {error.filename}: {error.strerror}", file=sys.stderr)
