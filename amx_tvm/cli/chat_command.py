"""`amx-tvm chat`: a conversation whose tokens stay in the KV cache between turns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amx_tvm.cli import interrupt, line_input
from amx_tvm.cli.conversation import Conversation
from amx_tvm.cli.generate_command import load_engine
from amx_tvm.errors import AmxError
from amx_tvm.runtime.chat import load_chat_template
from amx_tvm.runtime.options import read_options, text

# Command -> what it takes and does.
COMMANDS = {
    "/help": ("", "shows this"),
    "/system": ("[TEXT]", "shows or changes the system message; - takes it away"),
    "/regenerate": ("[TEMPERATURE]", "answers the last message again"),
    "/save": ("FILE", "writes the conversation into a file"),
    "/load": ("FILE", "goes on with the conversation of a file"),
    "/reset": ("", "forgets the conversation"),
    "/exit": ("", "leaves; so do /quit and Ctrl-D"),
}
_KEYS = (
    "Ctrl-C cuts an answer short. Alt-Enter, or Enter behind a backslash, breaks a line; what is "
    "pasted may have several. Any other line, also one that begins with /, is said to the model."
)


def run(
    artifact: Path,
    system: str | None,
    quiet: bool,
    load: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Read turns from stdin and stream the answers to stdout until /exit or the end of input."""
    text("--system", system or "")
    read_options(options)
    engine = load_engine(artifact, load)
    conversation = Conversation(engine, load_chat_template(artifact), system, options, quiet)
    interactive = line_input.in_terminal()
    read = line_input.editor([*COMMANDS, "/quit"]) if interactive else line_input.lines()
    if not quiet:
        name = engine.manifest.model["name"]
        plain = "no terminal: each line of the input is a message"
        _tell(f"{name}; {'/help shows what else there is' if interactive else plain}")
    try:
        while _turn(conversation, read, interactive):
            pass
    finally:
        conversation.close()


def _turn(conversation: Conversation, read: Callable[[], str], interactive: bool) -> bool:
    """Take one message or command; return False at the end."""
    try:
        words = text("the line", read())
        return not words.strip() or _obey(conversation, words)
    except EOFError:
        return False
    except (UnicodeError, AmxError) as error:
        if not interactive:
            raise
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        if not interactive:
            raise
        interrupt.clear()
        print("(the conversation goes on; /exit or Ctrl-D leaves)", file=sys.stderr)
    return True


def _obey(conversation: Conversation, words: str) -> bool:
    """Do what a line says; return False where it leaves."""
    command, _, argument = words.strip().partition(" ")
    argument = argument.strip()
    takes = COMMANDS.get(command, ("", ""))[0]
    if (argument and not takes) or ("\n" in words.strip() and command != "/system"):
        command = ""  # a message that begins like a command
    match command:
        case "/exit" | "/quit":
            return False
        case "/help":
            _help()
        case "/reset":
            conversation.reset()
        case "/system":
            _system(conversation, argument)
        case "/regenerate":
            conversation.regenerate(argument)
        case "/save":
            _tell(f"{conversation.save(argument)} messages saved in {argument}")
        case "/load":
            _tell(f"{conversation.load(argument)} messages loaded from {argument}")
        case _:
            conversation.say(words)
    return True


def _system(conversation: Conversation, argument: str) -> None:
    if argument:
        conversation.system = None if argument == "-" else argument
    _tell(f"system message: {conversation.system or 'none'}")


def _help() -> None:
    for command, (takes, does) in COMMANDS.items():
        _tell(f"{command + ' ' + takes:<26}{does}")
    _tell(_KEYS)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)
