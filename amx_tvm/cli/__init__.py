"""The command line `amx-tvm`: compile, generate, chat, inspect, devices.

Each command is a module here; `app` declares options and help and imports a command's module only
when it runs, so that `amx-tvm generate` does not wait for the compiler.
"""

from __future__ import annotations

import sys

from amx_tvm.errors import AmxError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        from amx_tvm.cli import ending
    except AmxError as error:  # a file of the user's in the place of a module
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    ending.main(arguments)
