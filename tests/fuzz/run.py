"""Fuzz every reader of others' files for a time: ``python -m tests.fuzz.run [SECONDS] [KIND ...]``.

The inputs follow from the seed, the environment's AMX_FUZZ_SEED, 0 by default: a longer run begins
with those of a shorter one.

Prints, for each kind, how many inputs were read and refused, and every other outcome with the input
that shows it, shrunk by hypothesis; exits with 1 where there is one.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from .kinds import Kind, kinds
from .limited import GOOD, Outcome, attempt, ending

ROUND = 20  # inputs of a kind before the next one's turn


class FoundError(Exception):
    """An input that ends in anything but a value or an AmxError."""


def try_round(kind: Kind, number: int, counts: Counter[str], end: float) -> str:
    """Try inputs of a kind; return what was found, or an empty text."""
    last = ""

    @seed(number)
    @settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.inputs)
    def check(case: object) -> None:
        nonlocal last
        if time.monotonic() > end:
            return
        run = attempt if kind.own_process else ending
        folder = Path(tempfile.mkdtemp(prefix="amx-fuzz-"))
        try:
            outcome: Outcome = run(lambda: kind.read(folder, case))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if outcome.word in GOOD:
            counts[outcome.word] += 1
            return
        last = f"{outcome.word}: {outcome.detail}\n    input {case!r:.600}"
        raise FoundError(f"{outcome.word} {outcome.detail.partition(':')[0]}")

    try:
        check()
    except Exception:  # also hypothesis's own, where time ran out while it shrank an input
        if not last:
            raise
        counts[last.partition(":")[0]] += 1
    return last


def main(arguments: list[str]) -> int:
    """Fuzz for the seconds and kinds that are named; return the exit code."""
    seconds = float(arguments[0]) if arguments else 60.0
    import jax._src.interpreters.mlir  # noqa: F401
    import tvm.relax.frontend.onnx  # noqa: F401 - before the children, which would each import it

    import amx_tvm.compiler  # noqa: F401
    import amx_tvm.runtime.chat

    with tempfile.TemporaryDirectory() as folder:
        every = kinds(Path(folder))
        amx_tvm.runtime.chat.process.shared.close()
        chosen = {name: every[name] for name in arguments[1:] or every}
        counts = {name: Counter[str]() for name in chosen}
        found: dict[str, set[str]] = {name: set() for name in chosen}
        end = time.monotonic() + seconds
        number = int(os.environ.get("AMX_FUZZ_SEED", "0")) << 20
        while time.monotonic() < end:
            for name, kind in chosen.items():
                number += 1
                failure = try_round(kind, number, counts[name], end)
                head = failure.partition("\n")[0]
                if failure and head not in found[name]:
                    found[name].add(head)
                    print(f"{name}: {failure}", flush=True)
    for name, count in counts.items():
        listed = ", ".join(f"{word} {count[word]}" for word in sorted(count)) or "none tried"
        print(f"{name:12} {sum(count.values()):6} inputs: {listed}")
    bad = sum(n for count in counts.values() for word, n in count.items() if word not in GOOD)
    print(f"{seconds:.0f} seconds, {bad} outcomes that are neither a value nor a refusal")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
