"""A plot of searches: the best time against the default's, by the number of trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from amx_tvm.errors import TuningError
from amx_tvm.extras import plotting


def draw(histories: Mapping[str, Sequence[float]], path: str | Path) -> None:
    """Draw one line a task.

    Parameters
    ----------
    histories : mapping
        Task -> the incumbent's time over the default's after each trial.
    path : path
        A .png, .svg or .pdf file.

    Raises
    ------
    TuningError
        When matplotlib is missing, or does not write this kind of file.
    """
    figures = plotting(path, TuningError)
    from matplotlib.ticker import MaxNLocator

    figure = figures.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, history in histories.items():
        axes.step(range(len(history) + 1), [1.0, *history], where="post", label=name, linewidth=1.2)
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trials")
    axes.set_ylabel("best time / default")
    axes.grid(alpha=0.3)
    if histories:
        axes.legend(fontsize=7, loc="best")
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise TuningError(f"{path}: {error}") from error
