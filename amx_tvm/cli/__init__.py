"""The command line `amx-tvm`: compile, generate, chat, inspect, devices.

Each command is a module here; `app` declares options and help and imports a command's module only
when it runs, so that `amx-tvm generate` does not wait for the compiler.
"""

from amx_tvm.cli.ending import main

__all__ = ["main"]
