"""`amx-tvm compile`: progress bars over the compiler, and what came out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from amx_tvm.cli import early
from amx_tvm.errors import ModelError

_STAGES = {
    "lower": "Passes and kernels",
    "weights": "Quantize and pack",
    "build": "Machine code",
    "calibrate": "Calibrate",
    "train": "Train",
    "sensitivity": "Sensitivity",
    "tune": "Tune",
}


class StageProgress:
    """One progress bar a stage; the object is the callback that `compile` calls.

    Called with (stage, done, total, detail). A stage's bar appears at its first call; what the
    model will take ("fit") is a line above them, also where no bars are shown unless ``quiet``.
    """

    def __init__(self, console: Console, show: bool = True, quiet: bool | None = None):
        self._quiet = not show if quiet is None else quiet
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            console=console,
            disable=not show,
            transient=False,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> StageProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._progress.stop()  # with an empty line, where nobody looks
        else:
            self._progress.live.stop()

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Show that ``done`` of ``total`` steps of a stage are finished."""
        if stage == "fit":
            if not self._quiet:
                self._progress.console.print(
                    detail, style="dim", highlight=False, markup=False, soft_wrap=True
                )
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(
                _STAGES.get(stage, stage), total=total, detail=detail
            )
        self._progress.update(self._tasks[stage], completed=done, total=total, detail=detail)


def named(given: Sequence[str] | None) -> dict[str, str] | None:
    """Return adapters given as NAME=DIR; ModelError for anything else, or a name given twice."""
    if not given:
        return None
    found: dict[str, str] = {}
    for one in given:
        name, equals, place = one.partition("=")
        if not equals or not place or name in found:
            raise ModelError(f"--adapters {one!r}: expected NAME=DIR, each name once")
        found[name] = place
    return found


def run(model: str, show: bool, as_json: bool, **options: Any) -> None:
    """Compile and print what was made; options as for `amx_tvm.compiler.compile`."""
    console = Console(stderr=True)
    start = time.perf_counter()
    early.check(options["target"], options["quantization"], options["strict"])
    with StageProgress(console, show) as progress:
        import amx_tvm.compiler

        artifact = amx_tvm.compiler.compile(model, progress=progress, **options)
    manifest = artifact.manifest
    seconds = time.perf_counter() - start
    if as_json:
        made = {
            "path": artifact.path,
            "model": manifest.model["name"],
            "target": manifest.target.key,
            "quantization": manifest.quantization.get("format", "none"),
            "bits_per_weight": manifest.quantization.get("bits_per_weight"),
            "parameters": manifest.parameters.bytes,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(made))
        return
    if show:
        bits = manifest.quantization.get("bits_per_weight")
        console.print(
            f"[green]{manifest.model['name']}[/] for {manifest.target.key}: "
            f"{manifest.parameters.bytes / 1e6:.1f} MB of parameters"
            + (f", {bits:.2f} bits per weight" if bits else "")
            + f", {seconds:.1f} s",
            highlight=False,
        )
    print(artifact.path)
