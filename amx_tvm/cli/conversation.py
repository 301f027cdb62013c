"""A conversation with a model: its turns, the sequence that holds them, and its file.

The file is JSON in the form that OpenAI's clients send::

    {"model": "SmolLM2-135M-Instruct",
     "messages": [{"role": "system", "content": "..."}, {"role": "user", "content": "..."}, ...]}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, TypedDict

from amx_tvm.artifact.publication import Publication
from amx_tvm.cli import interrupt
from amx_tvm.cli.generate_command import summary
from amx_tvm.cli.line_input import in_terminal
from amx_tvm.errors import AmxError, GenerationError
from amx_tvm.runtime import Engine
from amx_tvm.runtime.chat import ChatTemplates
from amx_tvm.runtime.options import text
from amx_tvm.schema import Mismatch, OneOf, conform
from amx_tvm.strict_json import read_json

_HINT = "name a file that /save made"


class Turn(TypedDict):
    """A message of text."""

    role: Annotated[str, OneOf(("system", "user", "assistant"))]
    content: str


class Saved(TypedDict):
    """What a file of a conversation holds."""

    messages: list[Turn]


class Conversation:
    """Turns of a user and a model; what was said stays in the KV cache.

    Parameters
    ----------
    engine : Engine
        The model.
    template : ChatTemplates
        Its chat templates.
    system : str or None
        The system message.
    options : dict
        Of `Engine.stream`.
    quiet : bool
        Print the answers only, without their timings.
    """

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplates,
        system: str | None,
        options: dict[str, Any],
        quiet: bool,
    ):
        self.system = system or None
        self._engine, self._template = engine, template
        self._options, self._quiet = options, quiet
        self._turns: list[Turn] = []  # without the system message
        self._sequence = engine.sequence()

    def __len__(self) -> int:
        return len(self._turns)

    def close(self) -> None:
        """Free what the conversation holds in the cache."""
        self._sequence.close()

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self._turns = []

    def say(self, words: str) -> None:
        """Stream the answer to a message; both are dropped where there is none.

        Raises
        ------
        GenerationError
            The conversation no longer fits, or the template refuses it.
        KeyboardInterrupt
            Ctrl-C before the answer began.
        """
        self._answer([*self._turns, {"role": "user", "content": words}], {})

    def regenerate(self, temperature: str = "") -> None:
        """Stream another answer to the last message, which replaces the one before.

        Raises
        ------
        GenerationError
            There is nothing to answer, or ``temperature`` is none.
        """
        turns = list(self._turns)
        while turns and turns[-1]["role"] != "user":
            turns.pop()
        if not turns:
            raise GenerationError("nothing has been asked yet")
        changed: dict[str, Any] = {}
        if temperature:
            try:
                changed["temperature"] = float(temperature)
            except ValueError:
                raise GenerationError(
                    f"the temperature is {temperature!r}, expected a number such as 0.7"
                ) from None
        elif not self._options.get("temperature"):
            print("(greedy: the same again; /regenerate 0.7 draws another)", file=sys.stderr)
        if self._options.get("seed") is not None:  # draws other tokens, still repeatable
            changed["seed"] = self._options["seed"] = self._options["seed"] + 1
        self._answer(turns, changed)

    def save(self, path: str) -> int:
        """Write the conversation into a file, over one that it was saved in; return its turns.

        Raises
        ------
        AmxError
            Something else is there, or it cannot be written.
        """
        target = _place(path)
        if os.path.lexists(target):
            try:
                _read(target)
            except AmxError:
                raise GenerationError(
                    f"{target} is no saved conversation and stays as it is; name another file"
                ) from None
        turns = self._messages(self._turns)
        saved = {"model": self._engine.manifest.model["name"], "messages": turns}
        with Publication(target, "name another file") as new:
            new.path.write_text(json.dumps(saved, ensure_ascii=False, indent=1) + "\n", "utf-8")
            new.publish(replace=True)
        return len(turns)

    def load(self, path: str) -> int:
        """Go on with the conversation of a file, system message included; return its turns.

        Raises
        ------
        AmxError
            It is no conversation, or one that this model's template refuses; nothing has changed.
        """
        turns = _read(_place(path))
        leads = bool(turns) and turns[0]["role"] == "system"
        self._template.render(turns)
        self.system = turns[0]["content"] if leads else None
        self._turns = turns[leads:]
        return len(turns)

    def _messages(self, turns: list[Turn]) -> list[Turn]:
        first: list[Turn] = [{"role": "system", "content": self.system}] if self.system else []
        return first + turns

    def _answer(self, turns: list[Turn], changed: dict[str, Any]) -> None:
        """Stream an answer; keep the turns with it, or with the part of it that Ctrl-C left."""
        options = {"sequence": self._sequence, **self._options, **changed}
        shown = ""
        try:
            stream = self._engine.stream(self._template.render(self._messages(turns)), **options)
        except GenerationError as error:
            raise GenerationError(f"{error} (or /reset)") if self._turns else error from None
        with stream as pieces:
            try:
                for piece in pieces:
                    shown += piece
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                if not shown or not in_terminal():
                    raise
                interrupt.clear()
                pieces.close()
                pieces.result.finish_reason = "interrupted"
            self._turns = [*turns, {"role": "assistant", "content": shown}]
            print()
            if not self._quiet:
                print(summary(pieces.result), file=sys.stderr)


def _place(path: str) -> Path:
    """Return a path that was typed."""
    if not path or "\0" in path:
        raise GenerationError("which file? Say its name behind the command")
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~somebody
        raise GenerationError(f"{path}: there is no such user's folder") from None


def _read(path: Path) -> list[Turn]:
    """Return the turns of a file."""
    try:
        value = read_json(path, GenerationError, _HINT)
        turns: list[Turn] = conform(Saved, value)["messages"]
    except FileNotFoundError:
        raise GenerationError(f"{path} does not exist; {_HINT}") from None
    except Mismatch as problem:
        raise GenerationError(f"{path}: {problem}; {_HINT}") from None
    for turn in turns:
        text(f"a message of {path}", turn["content"])
    return turns
