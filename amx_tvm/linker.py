"""Which compiler links a target's library: this machine's, Debian's cross compilers, the NDK's.

Where there is none, the object files can be kept to be linked elsewhere.
"""

from __future__ import annotations

import errno
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amx_tvm.errors import TargetError

NDK_VARIABLE = "TVM_NDK_CC"
HOST_VARIABLES = ("CXX", "CC")
_HOST_COMPILERS = ("g++", "gcc", "clang++", "clang", "c++", "cc")
_ELSEWHERE = "`amx-tvm export --no-link` writes object files and a script that links them elsewhere"


@dataclass(frozen=True)
class Linker:
    """A compiler that makes shared libraries; called as TVM calls its ``fcompile``.

    Attributes
    ----------
    command : tuple of str
        The program and what is always behind it, such as ("ccache", "g++").
    options : tuple of str
        Further options of every call.
    """

    command: tuple[str, ...]
    options: tuple[str, ...] = ()

    def __call__(self, output: str, objects: Sequence[str], *_: Any, **__: Any) -> None:
        """Link objects to a shared library; temporary files go beside it.

        Raises
        ------
        OSError
            ENOSPC, where there was no room for the library.
        TargetError
            With what the compiler says.
        """
        folder = str(Path(output).parent)
        command = [*self.command, "-shared", "-fPIC", "-o", output, *self.options, *objects]
        environment = {**os.environ, "TMPDIR": folder, "LC_ALL": "C"}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace"
            )
        except OSError as error:
            raise TargetError(f"`{self}` cannot be run: {error.strerror}; {_ELSEWHERE}") from None
        said = done.stderr + done.stdout
        if done.returncode and os.strerror(errno.ENOSPC) in said:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), output)
        if done.returncode:
            lines = [x for x in said.splitlines() if "error" in x or "cannot" in x]
            reason = (lines or said.splitlines() or [f"exit code {done.returncode}"])[0]
            raise TargetError(f"`{self}` cannot link a shared library: {reason}; {_ELSEWHERE}")

    def check(self, folder: Path) -> None:
        """Link a library of nothing, so that what is missing is found before the work.

        Raises
        ------
        OSError, TargetError
            As for a call.
        """
        library = folder / "nothing.so"
        self(str(library), ["-x", "assembler", os.devnull])
        library.unlink()

    def __str__(self) -> str:
        return shlex.join(self.command)


def linker(triple: str) -> Linker:
    """Return what links for a triple; "" is this machine.

    Raises
    ------
    TargetError
        When the compiler is not installed, with what installs it.
    """
    arch = triple.split("-")[0] if triple else platform.machine()
    if "android" in triple:
        compiler = os.environ.get(NDK_VARIABLE, "")
        hint = f"the NDK's clang++ (set {NDK_VARIABLE} to its path)"
    elif arch.replace("_", "-") == platform.machine().replace("_", "-"):
        return Linker(_host_compiler())
    else:
        compiler = f"{arch}-linux-gnu-g++"
        hint = f"{compiler} (Debian: apt-get install g++-{arch.replace('_', '-')}-linux-gnu)"
    if not shutil.which(compiler):
        raise TargetError(f"linking for {triple} needs {hint}; {_ELSEWHERE}")
    return Linker((compiler,), ("-O2", "-s"))


def _host_compiler() -> tuple[str, ...]:
    """Return this machine's compiler: what CXX or CC says, else the first that is installed."""
    for variable in HOST_VARIABLES:
        command = tuple(shlex.split(os.environ.get(variable, "")))
        if command and shutil.which(command[0]):
            return command
        if command:
            raise TargetError(
                f"{variable} is {shlex.join(command)!r}, and there is no such program; correct or "
                "unset it"
            )
    for name in _HOST_COMPILERS:
        if found := shutil.which(name):
            return (found,)
    raise TargetError(
        "a C or C++ compiler links the compiled model, and none is installed (looked for "
        f"{', '.join(_HOST_COMPILERS)}; Debian: apt-get install g++); install one, or name it in "
        "CXX"
    )


def collector(folder: Path) -> Callable[..., None]:
    """Return what takes a linker's place: it copies the object files into a new folder."""

    def collect(output: str, objects: Sequence[str], **options: Any) -> None:
        folder.mkdir()
        for file in objects:
            shutil.copyfile(file, folder / Path(file).name)

    return collect
