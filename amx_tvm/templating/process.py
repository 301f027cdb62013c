"""The parent's side of the process that runs chat templates.

One process serves all templates of a program; it is started by the first, takes 20 MB, waits for
requests and ends with the program. A template that goes beyond its limits ends it, and the next
request starts another.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from amx_tvm.errors import GenerationError
from amx_tvm.shadowing import user_folders
from amx_tvm.templating import limits
from amx_tvm.templating.child import LENGTH_BYTES

# -I and the parent's own search path, the user's folders last: no file there can take a name.
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from amx_tvm.templating.child import main; main()"
)


class InvalidTemplate(Exception):
    """A text that is no template; the message says why."""


class TemplateLimitError(GenerationError):
    """A chat template that went beyond a limit of `amx_tvm.templating.limits`."""


class TemplateProcess:
    """Renders templates in a process of its own; calls from several threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, names: dict[str, Any] | None) -> str:
        """Return what a template makes of ``names``.

        Parameters
        ----------
        source : str
            The template.
        names : dict or None
            JSON-ready values of the template's variables; None only compiles it.

        Raises
        ------
        InvalidTemplate
            When the text is no template.
        TemplateLimitError
            When it goes beyond a limit.
        GenerationError
            When the template refuses the conversation, a variable is no JSON, or the process
            cannot be started.
        """
        try:
            data = json.dumps({"source": source, "names": names}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise GenerationError(
                f"a chat template takes texts, numbers, lists and objects only: {error}"
            ) from None
        with self._lock:
            try:
                answer = self._ask(data)
            except BaseException:  # an interrupt as well: the next request must not read its answer
                self.close()
                raise
        if "invalid" in answer:
            raise InvalidTemplate(answer["invalid"])
        if "beyond" in answer:
            raise TemplateLimitError(f"the model's chat template is stopped: {answer['beyond']}")
        if "refused" in answer:
            raise GenerationError(
                f"the model's chat template refuses this conversation: {answer['refused']}"
            )
        return answer["text"]

    def _ask(self, data: bytes) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = _start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        end = time.monotonic() + limits.WAIT_SECONDS
        try:
            process.stdin.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
            process.stdin.flush()
            length = int.from_bytes(self._read(process, LENGTH_BYTES, end), "little")
            return json.loads(self._read(process, length, end))
        except (BrokenPipeError, EOFError):
            code = process.wait()
        self.close()
        if code == -signal.SIGPROF:
            return {"beyond": f"it runs for more than {limits.SECONDS:g} seconds"}
        return {"beyond": f"it ended the process that runs templates (exit code {code})"}

    @staticmethod
    def _read(process: subprocess.Popen[bytes], length: int, end: float) -> bytes:
        assert process.stdout is not None
        descriptor, data = process.stdout.fileno(), bytearray()
        while len(data) < length:
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                process.kill()
                raise TemplateLimitError(
                    "the model's chat template is stopped: no answer came within "
                    f"{limits.WAIT_SECONDS:g} seconds"
                )
            piece = os.read(descriptor, min(length - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            self._close_pipes(process)
            process.wait()

    def abandon(self) -> None:
        """Forget a parent's process after a fork; it stays the parent's."""
        process, self._process = self._process, None
        if process is not None:
            self._close_pipes(process)
            process.returncode = 0  # not ours to wait for

    @staticmethod
    def _close_pipes(process: subprocess.Popen[bytes]) -> None:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass  # what was not written yet


def _start() -> subprocess.Popen[bytes]:
    mine = user_folders()
    places = [place for place in sys.path if place not in mine]
    places += [str(Path(__file__).parents[2]), *map(os.path.abspath, mine)]
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-c", _COMMAND, json.dumps(places)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C is for the parent
        )
    except OSError as error:
        raise GenerationError(
            f"the process that runs chat templates cannot be started with {sys.executable!r}: "
            f"{error}"
        ) from None


shared = TemplateProcess()
atexit.register(shared.close)


def _after_fork() -> None:
    shared.abandon()
    shared._lock = threading.Lock()  # its owner may be a thread that the child lacks


os.register_at_fork(after_in_child=_after_fork)
