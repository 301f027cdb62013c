"""The charts of `amx-tvm inspect --html`, as SVG that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Sequence
from math import log10

from amx_tvm.cli.inspect_sizes import Floor, Roof

WIDTH, HEIGHT, LEFT, TOP = 640, 260, 60, 10
RIGHT, BASE = WIDTH - 10, HEIGHT - 50
BLUE, ORANGE = "#4269d0", "#ef7e18"


def tokens_chart(steps: Sequence[Floor]) -> str:
    """Return a chart of tokens/s of one sequence by context: at most what the machine allows."""
    points = [step for step in steps if step.sequences == steps[0].sequences]
    most = max(step.tokens_per_s for step in points)
    longest = max(step.context for step in points) or 1

    def place(step: Floor) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * step.context / longest
        return x, TOP + (BASE - TOP) * (1 - step.tokens_per_s / most)

    shown = [
        step
        for step in points
        if step.context in (points[0].context, longest) or step.context * 3 > longest
    ]
    labels = "".join(
        _text(place(step)[0], HEIGHT - 34, str(step.context), _anchor(step, longest))
        for step in shown
    )
    drawn = _line([place(step) for step in points], BLUE)
    drawn += "".join(_dot(place(step), BLUE) for step in points)
    drawn += (
        labels + _text(LEFT - 6, TOP + 8, f"{most:.0f}", "end") + _text(LEFT - 6, BASE, "0", "end")
    )
    return _chart(drawn, "cached tokens; up: tokens/s", "tokens a second at most, by cached tokens")


def roofline_chart(steps: Sequence[Floor], roof: Roof) -> str:
    """Return a chart of the roof, and of where steps lie under it, both axes logarithms."""
    shown = [step for step in steps if step.context == steps[0].context]
    low = min(step.intensity for step in shown) / 2
    high = 2 * max(roof.ridge, *(step.intensity for step in shown))
    least = low * roof.bandwidth

    def place(intensity: float) -> tuple[float, float]:
        reached = min(intensity * roof.bandwidth, roof.peak)
        x = LEFT + (RIGHT - LEFT) * log10(intensity / low) / log10(high / low)
        return x, BASE - (BASE - TOP) * log10(reached / least) / log10(roof.peak / least) * 0.9

    drawn = _line([place(at) for at in (low, roof.ridge, high)], ORANGE)
    for step in shown:
        x, y = place(step.intensity)
        drawn += f'<path d="M{x:.1f},{BASE}V{y:.1f}" stroke="{BLUE}" stroke-dasharray="3"/>'
        drawn += _dot((x, y), BLUE) + _text(x, HEIGHT - 34, str(step.sequences), "middle")
    x, y = place(roof.ridge)
    drawn += _text(x, y - 6, f"{roof.peak / 1e9:.0f} billion operations/s", "end")
    drawn += _text(LEFT + 6, BASE - 6, f"{roof.bandwidth / 1e9:.1f} GB/s", "start")
    return _chart(
        drawn,
        "sequences of a step, by operations a byte; up: operations/s, both logarithms",
        "the roof of this machine, and steps under it",
    )


def _chart(drawn: str, below: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{label}">'
        f'<path d="M{LEFT},{TOP}V{BASE}H{RIGHT}" fill="none" stroke="currentColor"/>'
        f"{drawn}{_text(RIGHT - 2, HEIGHT - 12, below, 'end')}</svg>"
    )


def _line(points: Sequence[tuple[float, float]], color: str) -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="2"/>'


def _dot(place: tuple[float, float], color: str) -> str:
    return f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="3" fill="{color}"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def _anchor(step: Floor, longest: int) -> str:
    return "end" if step.context == longest else "middle"
