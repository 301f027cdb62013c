"""`amx-tvm tune MODEL` and what can be done with records: list, show, verify, merge, prune."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from tuning.records import Record
    from tuning.session import Progress

Files = Annotated[list[Path], typer.Argument(metavar="RECORDS...", help="Files that tune made.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
File = Annotated[Path, typer.Argument(metavar="RECORDS", help="A file that tune made.")]
Target = Annotated[str, typer.Option(help="This machine's CPU (llvm) or GPU (cuda).")]
OfRecords = Annotated[str | None, typer.Option(help="By default that of the records.")]


class TuneGroup(TyperGroup):
    """`tune MODEL` is `tune model MODEL`: the first word is a command or a model."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the command's name where a model was given."""
        help_names = ctx.help_option_names
        if args and args[0] not in (*self.commands, *help_names):
            args = ["model", *args]
        return super().parse_args(ctx, args)


commands = typer.Typer(
    cls=TuneGroup,
    no_args_is_help=True,
    help="Measure which schedule parameters are fastest on this machine, and keep records of it.",
    epilog="Examples:\n\n"
    "amx-tvm tune models/SmolLM2-135M-Instruct --minutes 20\n\n"
    "amx-tvm tune dist/smollm2 --trials 200 --records my-records\n\n"
    "amx-tvm tune list\n\n"
    "amx-tvm compile models/SmolLM2-135M-Instruct --records tuning-records",
)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(commands, name="tune")
    app.command(
        name="device-server",
        epilog="Examples:\n\n"
        "python -m tvm.exec.rpc_tracker --port 9190   (on the machine that tunes)\n\n"
        "amx-tvm device-server --tracker 192.168.0.2:9190 --key pi4 --host 0.0.0.0  # board"
        "\n\n"
        "amx-tvm tune MODEL --target raspberry-pi/4b-aarch64 --remote 192.168.0.2:9190 --key pi4",
    )(device_server)


def device_server(
    tracker: Annotated[str, typer.Option(help="HOST:PORT of TVM's RPC tracker.")],
    key: Annotated[str, typer.Option(help="Kind of device, such as pi4; tuners ask for it.")],
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="First port to try.")] = 9090,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a kernel.")] = None,
    address: Annotated[str, typer.Option(help="Address that tuners shall use.")] = "",
) -> None:
    """Let tuners on other machines measure here: TVM's RPC server, with its runtime alone.

    Whoever reaches the port can run code on this machine. It listens to this machine alone unless
    --host says otherwise: say so only in networks that you trust.
    """
    from tuning.device_server import run

    run(tracker, key, host, port, threads, address)


@commands.command(name="model")
def model_(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model, its config.json, or an artifact."),
    ],
    target: Target = "llvm",
    quantization: Annotated[str, typer.Option(help="As for `compile`.")] = "amxfp4",
    minutes: Annotated[
        float | None, typer.Option(help="Budget; 10 if neither it nor --trials is given.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Budget in measured points.")] = None,
    records: Annotated[
        Path, typer.Option(help="Directory of the records and the log to continue.")
    ] = Path("tuning-records"),
    threads: Annotated[int | None, typer.Option(help="CPU threads of a kernel.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds for one candidate.")] = 60.0,
    jobs: Annotated[
        int | None, typer.Option(help="Processes that build for a GPU; by default a core each.")
    ] = None,
    remote: Annotated[
        str | None, typer.Option(help="HOST:PORT of an RPC tracker: measure on its devices.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Key of the devices at the tracker.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw how each search went into this .png or .svg file.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Tune the kernels of a model; a killed run continues where it was."""
    from rich.console import Console

    from amx_tvm.cli import early
    from amx_tvm.errors import TuningError
    from amx_tvm.extras import plotting

    early.check(target, quantization)
    from tuning.api import tune

    if plot is not None:
        plotting(plot, TuningError)
    console = Console(stderr=True)
    with Display(console, not quiet) as display:
        tuned = tune(
            model,
            target,
            quantization,
            minutes=minutes,
            trials=trials,
            records=records,
            threads=threads,
            limit=limit,
            jobs=jobs,
            remote=remote,
            key=key,
            progress=display,
        )
    for damage in tuned.damage:
        console.print(f"[yellow]skipped[/] {damage}", highlight=False)
    if tuned.lost:
        console.print(f"[yellow]{tuned.lost} devices disappeared[/]; others did their trials")
    if plot is not None:
        from tuning.plot import draw

        draw({s.task.text: s.search.history for s in tuned.states}, plot)
    if not quiet:
        console.print(_summary(tuned.states), highlight=False)
        found = sum(s.record is not None for s in tuned.states)
        console.print(
            f"{tuned.trials} new trials; {found} of {len(tuned.states)} kernels have a record; "
            f"linears of a decode step {tuned.step_ratio():.3f}, of a prefill "
            f"{tuned.step_ratio(decode=False):.3f} of the defaults' time",
            highlight=False,
        )
    print(tuned.path if tuned.path.exists() else tuned.log)


class Display:
    """A live table of the tasks: trials, best against default, failures; and the time left."""

    def __init__(self, console: Any, show: bool):
        from rich.live import Live

        self._live = Live(console=console, refresh_per_second=4, transient=True) if show else None
        self._states: dict[str, Any] = {}

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
            self._live.update("Listing kernels")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Show what a trial changed."""
        if self._live is None:
            return
        budget = f" of {progress.budget}" if progress.budget is not None else ""
        left = f", {progress.remaining:.0f} s left" if progress.remaining is not None else ""
        title = f"{progress.trials}{budget} trials in {progress.elapsed:.0f} s{left}"
        table = _table(title, "", "kernel", "points", "failed", "best / default")
        self._states[progress.state.task.text] = progress.state
        for text, state in self._states.items():
            search = state.search
            table.add_row(
                ">" if state is progress.state else "",
                text,
                f"{search.trials} of {state.space.size - 1}",
                str(sum(state.failures.values()) or "-"),
                f"{search.best_ratio:.3f}",
            )
        self._live.update(table)


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _summary(states: Any) -> Any:
    table = _table("Kernels", "kernel", "runs", "default", "points", "failed", "record", "time")
    for state in states:
        task = state.task
        runs = f"{task.decode} a step" if task.decode else f"{task.prefill} a prefill"
        default = "-" if state.default_seconds is None else f"{state.default_seconds * 1e6:.1f} us"
        record = state.record
        table.add_row(
            task.text,
            runs,
            default,
            f"{state.search.trials} of {state.space.size - 1}",
            ", ".join(f"{n} {kind}" for kind, n in state.failures.items()) or "-",
            _knobs(record.knobs) if record else "default",
            _ratio(record) if record else "1",
        )
    return table


def _knobs(knobs: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in knobs.items())


def _ratio(record: Record) -> str:
    q1, median, q3 = record.ratio
    return f"{median:.3f} ({q1:.3f}-{q3:.3f})"


def _open(path: Path) -> Any:
    from amx_tvm.errors import TuningError
    from tuning.records import RecordFile

    if not path.is_file():
        raise TuningError(f"there is no record file {path}; `amx-tvm tune MODEL` makes one")
    return RecordFile(path)


def _console() -> Any:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


@commands.command()
def package(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model or its config.json.")],
    target: Annotated[str, typer.Option(help="A CUDA target, such as cuda:sm_90a.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")],
    quantization: Annotated[str, typer.Option(help="As for `compile`.")] = "amxfp4",
    candidates: Annotated[int, typer.Option(help="Points for each kernel.")] = 16,
    rows: Annotated[
        list[int] | None, typer.Option(help="Only kernels for so many rows; may be repeated.")
    ] = None,
    records: Annotated[Path, typer.Option(help="Directory of the log to continue.")] = Path(
        "tuning-records"
    ),
    jobs: Annotated[int, typer.Option(help="Processes that build.")] = 1,
) -> None:
    """Build candidates for a GPU elsewhere; `python -m tuning.package_run` measures them."""
    from rich.console import Console

    from tuning.package import create

    console = Console(stderr=True)
    with console.status("Listing kernels") as status:
        made = create(
            model,
            target,
            output,
            quantization,
            candidates=candidates,
            records=records,
            rows=rows,
            jobs=jobs,
            tell=status.update,
        )
    print(made)


@commands.command(name="import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="PACKAGE", help="With its results.json.")],
    records: Annotated[Path, typer.Option(help="Directory of the records and the log.")] = Path(
        "tuning-records"
    ),
) -> None:
    """Make records of what was measured in a package."""
    from tuning.package_import import collect

    found = collect(folder, records)
    _console().print(_summary(found.states), highlight=False)
    for refusal in found.refused:
        print(f"not imported: {refusal}", file=sys.stderr)
    print(found.path)


@commands.command(name="list")
def list_(
    directory: Annotated[
        Path | None, typer.Argument(help="A directory; by default what ships in the package.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List record files: target, records, unreadable lines."""
    from tuning.records import SHIPPED, RecordFile

    folder = directory or SHIPPED
    paths = [p for p in sorted(folder.glob("*.jsonl")) if not p.name.endswith(".trials.jsonl")]
    rows = []
    for file in map(RecordFile, paths):
        targets = sorted({record.target for record in file.records})
        rows.append((file.path.name, targets, len(file.records), len(file.damage)))
    if as_json:
        names = ("file", "targets", "records", "unreadable")
        print(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=1))
        return
    table = _table(str(folder), "file", "target", "records", "unreadable lines")
    for name, targets, count, damaged in rows:
        table.add_row(name, ", ".join(targets) or "-", str(count), str(damaged))
    if rows:
        _console().print(table, highlight=False)
    else:
        print(f"no tuning records in {folder}")


@commands.command()
def show(records: File, as_json: AsJson = False) -> None:
    """Show the records of a file."""
    file = _open(records)
    if as_json:
        found = [record.to_json() for record in file.records]
        print(json.dumps({"records": found, "unreadable": list(map(str, file.damage))}, indent=1))
        return
    table = _table(str(records), "kernel", "knobs", "median", "time / default", "measured on")
    for record in file.records:
        host = f"{record.host.get('gpu') or record.host.get('cpu', '?')}, {record.time}"
        seconds = f"{record.seconds * 1e6:.1f} us"
        table.add_row(record.kernel.text, _knobs(record.knobs), seconds, _ratio(record), host)
    _console().print(table, highlight=False)
    for damage in file.damage:
        print(f"unreadable: {damage}")


@commands.command()
def verify(records: File, target: OfRecords = None, as_json: AsJson = False) -> None:
    """Build every record's kernel again and compare it with NumPy; exit code 1 if one fails.

    Records of a GPU that is not here are built and replayed only.
    """
    from tuning.verify import compares, target_of
    from tuning.verify import verify as run

    file = _open(records)
    target = target or target_of(file)
    compared = compares(target)
    tell = (lambda _: None) if as_json else print
    for damage in file.damage:
        tell(f"unreadable: {damage}")
    rows = []
    for record, reason in run(file, target):
        rows.append({"kernel": record.kernel.text, "refused": reason})
        text = f": {reason}" if reason else ""
        tell(f"{'refused' if reason else 'ok'}: {record.kernel.text}{text}")
    if not compared:
        tell(f"no {target} is here: kernels were built, and no number was compared")
    if as_json:
        unreadable = list(map(str, file.damage))
        found = {"target": target, "compared": compared, "records": rows, "unreadable": unreadable}
        print(json.dumps(found, indent=1))
    raise typer.Exit(1 if file.damage or any(row["refused"] for row in rows) else 0)


@commands.command()
def merge(
    records: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
) -> None:
    """Write the records of several files of one target into one."""
    from tuning.records import merge as run

    print(f"{len(run(records, output).records)} records in {output}")


@commands.command()
def prune(records: File, target: OfRecords = None) -> None:
    """Drop slower duplicates, unreadable lines, and records of schedules that have changed."""
    from tuning.records import prune as run
    from tuning.verify import current_kernels, target_of

    file = _open(records)
    kernels = current_kernels(file, target or target_of(file))
    print(f"{run(records, kernels)} lines dropped from {records}")
