"""Kill or fail every file operation of a command in turn, as a machine would; see what is left.

    python tests/faults/every_operation.py compile|overwrite|quantize|export|archive|journal ...
        [--ways kill fail full] [--every N]

After each operation the output is the old one or the new one, an error is one line (of a full disk
with its place), and after the next run nothing lies beside it. What the compiler made once is taken
again, since it is files that are judged here. The script starts itself anew with
`file_operations.c` preloaded, which counts.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WAYS = ("count", "kill", "fail", "full")  # in the order of file_operations.c
NOTHING = "nothing"
PATIENCE = 300  # seconds
Act = Callable[[Path], object]  # a command, given its output


def preloaded(arguments: list[str], folder: Path, out: int | None = subprocess.PIPE) -> str:
    """Run this script with the counting library, which is built into a folder; return its words."""
    library = folder / "file_operations.so"
    compiler = os.environ.get("CC", "cc").split()
    source = str(HERE / "file_operations.c")
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, env=environment, stdout=out, text=True, check=True).stdout


def content(path: Path) -> str:
    """Return a digest of what a reader finds at a path."""
    if not os.path.lexists(path):
        return NOTHING
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        digest.update(str(file.relative_to(path)).encode())
        digest.update(file.read_bytes() if file.is_file() else b"/")
    return digest.hexdigest()


def compiling(base: Path) -> Path:
    """Compile a tiny model once; from here on its lowered form and library are taken again."""
    import amx_tvm
    from amx_tvm.compiler import lowered
    from amx_tvm.config import QuantizationConfig
    from amx_tvm.frontends import open_model
    from amx_tvm.targets import resolve

    model = tiny(base)
    amx_tvm.compile(model, quantization="none", output=base / "first")
    config = QuantizationConfig.parse("none").resolve("cpu")
    made = lowered.lower_source(open_model(model), resolve("llvm"), config)
    module = sys.modules["amx_tvm.compiler.compile"]
    module.lower_source = lambda *_, **__: made  # type: ignore[attr-defined]
    module.write_library = lambda _, __, path, ___: shutil.copyfile(  # type: ignore[attr-defined]
        base / "first" / "lib.so", path
    )
    return model


def tiny(base: Path) -> Path:
    """Write a model."""
    sys.path.insert(0, str(ROOT / "tests" / "runtime"))
    import tiny_model

    return tiny_model.write_model(base / "model")


def compile_(base: Path) -> Act:
    """Return `amx-tvm compile`, which replaces what is there."""
    import amx_tvm

    model = compiling(base)
    return lambda output: amx_tvm.compile(model, quantization="none", output=output, overwrite=True)


def quantize(base: Path) -> Act:
    """Return `amx-tvm quantize`."""
    from amx_tvm.compiler.checkpoint import quantize_checkpoint

    model = tiny(base)
    return lambda output: quantize_checkpoint(model, output, "mxfp4")


def export(base: Path) -> Act:
    """Return `amx-tvm export`, to a directory or an archive."""
    from amx_tvm.exporting import export as run

    model = compiling(base)
    return lambda output: run(
        model, "llvm", output, quantization="none", runtimes=(), overwrite=True
    )


def journal(base: Path) -> Act:
    """Return what rewrites a record file."""
    from tuning.journal import replace

    return lambda output: replace(output, ({"line": n, "text": "x" * 5000} for n in range(9)))


# Command -> (what makes it, name of the output, whether something is there before).
COMMANDS = {
    "compile": (compile_, "out", False),
    "overwrite": (compile_, "out", True),
    "quantize": (quantize, "out", False),
    "export": (export, "out", True),
    "archive": (export, "out.tar.gz", True),
    "journal": (journal, "out.jsonl", True),
}


def in_child(action: Callable[[], object]) -> str:
    """Run in a forked child; return "done", "killed", or the line that a user would read."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "done"
        try:
            signal.alarm(PATIENCE)
            action()
        except Exception as error:
            from amx_tvm.cli.ending import explained

            said = explained(error) or f"TRACEBACK of {type(error).__name__}: {error}"
        finally:
            os.write(write, pickle.dumps(said)[:60000])
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (
        pickle.loads(said) if code == 0 else {-signal.SIGKILL: "killed"}.get(code, f"CODE {code}")
    )


class Sweep:
    """The operations of one command, struck one after another."""

    def __init__(self, command: str, base: Path):
        prepare, name, self.replaces = COMMANDS[command]
        self.area = base / "area"
        self.output = self.area / name
        self.library = ctypes.CDLL(None)
        self.act = prepare(base)
        self.kept, counted = base / "kept", base / "count"
        self.reset()

        def count() -> None:
            self.library.faults_arm(bytes(self.area), 0, 0)
            self.act(self.output)
            counted.write_text(str(self.library.faults_count()))

        assert in_child(count) == "done"
        self.new, self.total = content(self.output), int(counted.read_text())
        if self.replaces:
            os.rename(self.output, self.kept)
            (self.kept / "old" if self.kept.is_dir() else self.kept).write_text("old")
        self.reset()
        self.old = content(self.output)

    def reset(self) -> None:
        """Put what was there before back."""
        shutil.rmtree(self.area, ignore_errors=True)
        self.area.mkdir()
        if self.kept.is_dir():
            shutil.copytree(self.kept, self.output)
        elif self.kept.exists():
            shutil.copyfile(self.kept, self.output)

    def strike(self, way: str, number: int) -> str:
        """Strike one operation; return what is wrong then, or ""."""

        def struck() -> None:
            self.library.faults_arm(bytes(self.area), WAYS.index(way), number)
            self.act(self.output)

        self.reset()
        said = in_child(struck)
        found = content(self.output)
        if found not in (self.old, self.new):
            return f"a part is there ({said})"
        if said == "done" and found != self.new:
            return "nothing was said"
        if way == "kill" and said != "killed":
            return f"not killed: {said}"
        named = "o space left" in said and str(self.output) in said and "are free" in said
        if way == "full" and said != "done" and not named:
            return f"says {said!r}"
        if said.startswith(("TRACEBACK", "CODE")) or "\n" in said:
            return said
        if way != "kill" and os.listdir(self.area) not in ([], [self.output.name]):
            if way == "full":
                return f"{sorted(os.listdir(self.area))} stay"
        said = in_child(lambda: self.act(self.output))
        if not (content(self.output) == self.new and (said == "done" or "exists" in said)):
            return f"the next run: {said}"
        beside = sorted(set(os.listdir(self.area)) - {self.output.name})
        return f"{beside} stay after the next run" if beside else ""


def main() -> None:
    """Sweep the commands that are given; print a line of JSON for each command and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commands", nargs="+", choices=COMMANDS)
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=WAYS[1:])
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        base = Path(folder)
        if not hasattr(ctypes.CDLL(None), "faults_arm"):
            preloaded(sys.argv[1:], base, None)
            return
        for command in options.commands:
            place = base / command
            place.mkdir()
            sweep = Sweep(command, place)
            for way in options.ways:
                numbers = range(1, sweep.total + 1, options.every)
                wrong = {n: what for n in numbers if (what := sweep.strike(way, n))}
                line = {"command": command, "way": way, "operations": sweep.total}
                print(json.dumps({**line, "struck": len(numbers), "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main()
