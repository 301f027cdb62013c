"""`amx-tvm inspect --html`: one page that shows an artifact; it needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from amx_tvm.cli.inspect_sizes import PARTS, Floor, LayerSize

COLORS = {"attention": "#4269d0", "MLP": "#efb118", "other": "#97bbf5"}
STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}tr{border-bottom:1px solid var(--line)}
td,th{padding:.15rem .7rem .15rem 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.bar{display:flex;height:.8rem;background:var(--soft);width:24rem}.bar i{display:block}
.key i{display:inline-block;width:.8rem;height:.8rem;margin:0 .3rem 0 1rem}
.wide{overflow-x:auto}svg text{fill:currentColor;font-size:12px}
"""


def page(
    title: str,
    facts: Iterable[tuple[str, str]],
    sizes: Sequence[LayerSize],
    kernels: Iterable[tuple[Sequence[str], int]],
    columns: Sequence[str],
    steps: Sequence[Floor],
    bandwidth: float | None,
    errors: Mapping[str, float],
) -> str:
    """Return the HTML text.

    Parameters
    ----------
    title : str
        The model's name.
    facts : iterable of (str, str)
        What `inspect` prints first.
    sizes : sequence of LayerSize
        Layers.
    kernels, columns
        Rows of the table of linears with their counts, and its heads.
    steps : sequence of Floor
        Floors of decode steps here; none where nothing was measured.
    bandwidth : float or None
        Bytes a second that were measured.
    errors : mapping of str to float
        Relative squared error of weights by layer; empty where it is not known.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table((), ([name, value] for name, value in facts)),
        "<h2>Bytes and bits by layer</h2>",
        _layers(sizes),
        "<h2>Kernels by rows</h2>",
        "<p>What each linear runs, from how many rows of x on.</p>",
        _table(columns, ([*cells, str(count)] for cells, count in kernels)),
    ]
    if errors:
        parts += ["<h2>Quantization error by layer</h2>", _errors(errors)]
    if steps and bandwidth:
        parts += ["<h2>Roofline of a step on this machine</h2>", _steps(steps, bandwidth)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>\n{body}\n</body></html>\n"
    )


class _Html(str):
    """A text that is HTML already."""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table; what is no `_Html` is text of strangers."""

    def cell(kind: str, index: int, text: str) -> str:
        right = ' class="n"' if index in numbers else ""
        return f"<{kind}{right}>{text if isinstance(text, _Html) else escape(text)}</{kind}>"

    lines = [("th", heads)] if heads else []
    lines += [("td", row) for row in rows]
    made = ("".join(cell(kind, i, t) for i, t in enumerate(row)) for kind, row in lines)
    inner = "".join(f"<tr>{row}</tr>" for row in made)
    return f'<div class="wide"><table>{inner}</table></div>'


def _bar(shares: Iterable[tuple[str, float]]) -> _Html:
    inner = "".join(f'<i style="width:{100 * w:.2f}%;background:{c}"></i>' for c, w in shares)
    return _Html(f'<div class="bar">{inner}</div>')


def _layers(sizes: Sequence[LayerSize]) -> str:
    most = max((size.bytes for size in sizes), default=1) or 1
    rows = [
        [
            size.name,
            f"{size.bytes / 1e6:.2f}",
            "" if size.bits is None else f"{size.bits:.3f}",
            _bar((COLORS[part], size.parts.get(part, 0) / most) for part in PARTS),
        ]
        for size in sizes
    ]
    key = "".join(f'<i style="background:{color}"></i>{part}' for part, color in COLORS.items())
    return f'<p class="key">{key}</p>' + _table(
        ("", "MB", "bits a weight", ""), rows, numbers=(1, 2)
    )


def _errors(errors: Mapping[str, float]) -> str:
    most = max(errors.values()) or 1.0
    rows = [
        [name, f"{error:.5f}", _bar([(COLORS["attention"], error / most)])]
        for name, error in errors.items()
    ]
    note = (
        "<p>||W - Q||&sup2; / ||W||&sup2; of plain rounding to the artifact's format, the mean "
        "of a layer's linears by their sizes.</p>"
    )
    return note + _table(("", "error", ""), rows, numbers=(1,))


def _steps(steps: Sequence[Floor], bandwidth: float) -> str:
    rows = [
        [
            str(step.sequences),
            str(step.context),
            f"{step.bytes / 1e6:.1f}",
            f"{step.operations / step.bytes:.1f}",
            f"{1000 * step.seconds:.2f}",
            f"{step.tokens_per_s:.0f}",
        ]
        for step in steps
    ]
    heads = (
        "sequences", "context", "MB read", "operations a byte", "ms at least", "tokens/s at most",
    )  # fmt: skip
    return (
        f"<p>This machine reads {bandwidth / 1e9:.1f} GB/s; a decode step reads every weight once "
        "and the keys and values of every cached token. Many sequences are bound by arithmetic "
        "before they reach this; <code>amx-tvm bench</code> measures what is reached.</p>"
        + _chart(steps)
        + _table(heads, rows, numbers=range(6))
    )


def _chart(steps: Sequence[Floor]) -> str:
    """Return an SVG of tokens/s of one sequence by context: at most what memory allows."""
    points = [step for step in steps if step.sequences == steps[0].sequences]
    width, height, left, top = 640, 260, 60, 10
    most = max(step.tokens_per_s for step in points)
    longest = max(step.context for step in points) or 1

    def place(step: Floor) -> tuple[float, float]:
        x = left + (width - left - 10) * step.context / longest
        return x, top + (height - top - 50) * (1 - step.tokens_per_s / most)

    line = " ".join("{:.1f},{:.1f}".format(*place(step)) for step in points)
    dots = "".join(
        '<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="#4269d0"/>'.format(*place(step))
        for step in points
    )
    labels = "".join(
        f'<text x="{place(step)[0]:.1f}" y="{height - 34}" text-anchor="{_anchor(step, longest)}">'
        f"{step.context}</text>"
        for step in points
        if step.context in (points[0].context, longest) or step.context * 3 > longest
    )
    base = height - 50
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        'aria-label="tokens a second at most, by cached tokens">'
        f'<path d="M{left},{top}V{base}H{width - 10}" fill="none" stroke="currentColor"/>'
        f'<polyline points="{line}" fill="none" stroke="#4269d0" stroke-width="2"/>{dots}{labels}'
        f'<text x="{left - 6}" y="{top + 8}" text-anchor="end">{most:.0f}</text>'
        f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>'
        f'<text x="{width - 12}" y="{height - 12}" text-anchor="end">'
        "cached tokens; up: tokens/s</text>"
        "</svg>"
    )


def _anchor(step: Floor, longest: int) -> str:
    return "end" if step.context == longest else "middle"
