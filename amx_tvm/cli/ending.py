"""How a command ends: its errors and exit codes.

An AmxError is one red line on stderr and exit code 2, like a wrong option, and so is what the
system refuses (OSError, memory) and text that is no UTF-8. Ctrl-C is exit code 130, a reader that
has enough (`| head`) is success; anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn

from amx_tvm.cli import interrupt
from amx_tvm.cli.app import app
from amx_tvm.errors import AmxError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this, as by cron
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows "?"
            stream.reconfigure(errors="replace")
    interrupt.watch()
    try:
        code = app(arguments, prog_name="amx-tvm", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 0
    except SystemExit as error:  # rich ends so where the pipe is broken
        code = 0 if isinstance(error.__context__, BrokenPipeError) else error.code
    except Exception as error:
        if interrupt.pressed():
            sys.exit(130)
        if message := explained(error):
            fail(message)
            _leave(getattr(error, "exit_code", 2))
        if not hasattr(error, "format_message"):  # a wrong option or argument (click)
            raise
        if message := error.format_message():  # empty: the help was printed
            fail(f"{message} Try `{_command(error)} --help`.")
        code = 2
    _leave(code if isinstance(code, int) else 0)


def explained(error: Exception) -> str:
    """Return the line that tells a user of an error, or "" where it is a defect."""
    if isinstance(error, AmxError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'standard input or output'}: {error.strerror}"
    if isinstance(error, UnicodeDecodeError):
        return f"a byte at {error.start} is no {error.encoding}; convert the text to UTF-8"
    if isinstance(error, MemoryError):
        return "the memory of this machine is not enough"
    return ""


def _leave(code: int) -> NoReturn:
    """Exit; what can no longer be written is left out without another word."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _command(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else "amx-tvm"


def fail(message: str) -> None:
    """Print one line to stderr, red where it is a terminal."""
    line = "error: " + " ".join(message.split())
    if sys.stderr.isatty():
        line = f"\x1b[31m{line}\x1b[0m"
    with suppress(OSError):  # nobody reads it
        print(line, file=sys.stderr)
