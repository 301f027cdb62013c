"""The process that runs chat templates: one request in, one answer out, until its input ends.

A message is a length of 8 bytes, little endian, and as many bytes of JSON. A request has "source"
and "names", or null names to compile only; an answer has one key: "text", "invalid" (no template),
"refused" (the template's own error) or "beyond" (a limit).
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any, BinaryIO

from amx_tvm.templating import limits

LENGTH_BYTES = 8


def send(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Write a message."""
    data = json.dumps(message).encode()
    stream.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
    stream.flush()


def receive(stream: BinaryIO) -> dict[str, Any] | None:
    """Read a message; None where the stream ends."""
    length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
    data = stream.read(length)
    return json.loads(data) if length and len(data) == length else None


def main() -> None:
    """Answer requests under the limits of `amx_tvm.templating.limits`."""
    from amx_tvm.templating import sandbox  # before the limits: importing takes memory

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limits.MEMORY_BYTES, limits.MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, inside C code too
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    while (request := receive(source)) is not None:
        signal.setitimer(signal.ITIMER_PROF, limits.SECONDS)
        answer = _answer(sandbox, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(answers, answer)


def _answer(sandbox: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Render or compile. A stranger's program may raise anything, so everything is caught."""
    kind = "invalid"
    try:
        sandbox.compiled(request["source"])
        if request["names"] is None:
            return {"text": ""}
        kind = "refused"
        text = sandbox.rendered(request["source"], request["names"])
        text.encode()  # half of a surrogate pair is no text
        return {"text": text}
    except (sandbox.LimitError, RecursionError, MemoryError) as error:
        words = {RecursionError: "it nests too deeply", MemoryError: "it needs too much memory"}
        return {"beyond": words.get(type(error), str(error))}
    except Exception as error:
        return {kind: " ".join(str(error).split())[:2000] or type(error).__name__}
