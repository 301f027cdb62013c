"""Run an action in a forked child: what it raised, and whether it crashed, hung or grew."""

from __future__ import annotations

import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from amx_tvm.errors import AmxError

GROWTH_BYTES = 1 << 30  # beyond what the parent has
CPU_SECONDS, SECONDS = 10.0, 600.0  # the second for those that wait
GOOD = ("read", "refused")


@dataclass(frozen=True)
class Outcome:
    """How one input ended: one of GOOD, or "raw", "wrong", "crash", "hang" or "growth"."""

    word: str
    detail: str = ""


class WrongError(Exception):
    """Something was read that should not have been."""


def attempt(action: Callable[[], None]) -> Outcome:
    """Run ``action`` in a child of this process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            os.write(write, "\0".join(_child(action)).encode("utf-8", "replace")[:4000])
        finally:
            os._exit(0)
    os.close(write)
    data, end = b"", time.monotonic() + SECONDS
    while select.select([read], [], [], max(0.0, end - time.monotonic()))[0]:
        piece = os.read(read, 65536)
        if not piece:
            break
        data += piece
    else:
        os.kill(child, signal.SIGKILL)
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (-signal.SIGKILL, -signal.SIGPROF):
        return Outcome("hang", f"more than {CPU_SECONDS:g} seconds")
    if code or not data:
        return Outcome("crash", signal.Signals(-code).name if code < 0 else f"exit code {code}")
    word, _, detail = data.decode("utf-8", "replace").partition("\0")
    return Outcome(word, detail)


def ending(action: Callable[[], None]) -> Outcome:
    """Run ``action`` here, without limits."""
    try:
        action()
        return Outcome("read")
    except KeyboardInterrupt:
        raise
    except AmxError as error:
        return Outcome("refused", str(error))
    except MemoryError as error:
        return Outcome("growth", _place(error))
    except WrongError as error:
        return Outcome("wrong", str(error))
    except BaseException as error:
        return Outcome("raw", f"{type(error).__name__}: {error}"[:300] + f" at {_place(error)}")


def _child(action: Callable[[], None]) -> tuple[str, str]:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + GROWTH_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    outcome = ending(action)
    return outcome.word, outcome.detail


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/amx_tvm/" in f.filename or "/tuning/" in f.filename] or frames
    return f"{own[-1].filename.rpartition('/')[2]}:{own[-1].lineno}" if own else "?"
