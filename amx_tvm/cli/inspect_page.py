"""`amx-tvm inspect --html`: one page that shows an artifact; it needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from amx_tvm.cli.inspect_charts import roofline_chart, tokens_chart
from amx_tvm.cli.inspect_sizes import PARTS, Floor, LayerSize, Roof

COLORS = {"adapters": "#ff725c", "attention": "#4269d0", "MLP": "#efb118", "other": "#97bbf5"}
STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}tr{border-bottom:1px solid var(--line)}
td,th{padding:.15rem .7rem .15rem 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.bar{display:flex;height:.8rem;background:var(--soft);width:24rem}.bar i{display:block}
.key i{display:inline-block;width:.8rem;height:.8rem;margin:0 .3rem 0 1rem}
.wide{overflow-x:auto}svg{max-width:100%;height:auto}svg text{fill:currentColor;font-size:12px}
"""


def page(
    title: str,
    facts: Iterable[tuple[str, str]],
    sizes: Sequence[LayerSize],
    kernels: Iterable[tuple[Sequence[str], int]],
    columns: Sequence[str],
    steps: Sequence[Floor],
    roof: Roof | None,
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
    roof : Roof or None
        What was measured of this machine.
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
    if steps and roof:
        parts += ["<h2>Roofline of a step on this machine</h2>", _steps(steps, roof)]
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
    seen = {part: color for part, color in COLORS.items() if any(part in s.parts for s in sizes)}
    key = "".join(f'<i style="background:{color}"></i>{part}' for part, color in seen.items())
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


def _steps(steps: Sequence[Floor], roof: Roof) -> str:
    rows = [
        [
            str(step.sequences),
            str(step.context),
            f"{step.bytes / 1e6:.1f}",
            f"{step.intensity:.1f}",
            "memory" if step.intensity < roof.ridge else "arithmetic",
            f"{1000 * step.seconds:.2f}",
            f"{step.tokens_per_s:.0f}",
        ]
        for step in steps
    ]
    heads = (
        "sequences", "context", "MB read", "operations a byte", "bound by", "ms at least",
        "tokens/s at most",
    )  # fmt: skip
    return (
        f"<p>This machine reads {roof.bandwidth / 1e9:.1f} GB/s and makes {roof.peak / 1e9:.0f} "
        f"billion operations a second with {roof.products}, a product and its sum being two. A "
        "decode step reads every weight once and the keys and values of every cached token; the "
        "operations are those of the linears. <code>amx-tvm bench</code> measures what is "
        "reached.</p>"
        + roofline_chart(steps, roof)
        + tokens_chart(steps)
        + _table(heads, rows, numbers=(0, 1, 2, 3, 5, 6))
    )
