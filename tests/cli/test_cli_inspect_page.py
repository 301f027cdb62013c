"""`amx-tvm inspect --html`: one page with layers, kernels, errors and the floor of a step."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from amx_tvm.artifact.manifest import Manifest
from amx_tvm.bench import arithmetic, memory
from amx_tvm.cli import inspect_command
from amx_tvm.cli.inspect_page import page
from amx_tvm.cli.inspect_sizes import LayerSize, Roof, floors, layer_sizes
from relax_passes.chosen import ChosenKernel, chosen_kernels
from relax_passes.spec import LinearSpec


class Text(HTMLParser):
    """Words of a page, and what is open at its end."""

    def __init__(self, page):
        super().__init__()
        self.words, self.stack, self.links = [], [], []
        self.feed(page)
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "circle", "path", "polyline"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "circle", "path", "polyline"):
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


def test_the_page_of_an_artifact(run, artifact, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "read_bandwidth", lambda threads: 10e9)
    monkeypatch.setattr(arithmetic, "peak_operations", lambda threads, exact: 700e9)
    monkeypatch.setattr(inspect_command, "_errors", lambda model, made: {"layer 0": 0.007})
    output = tmp_path / "page.html"
    code, out, _ = run("inspect", artifact, "--html", output, "--model", "somewhere")
    assert (code, out) == (0, f"{output}\n")
    found = Text(output.read_text("utf-8"))
    assert found.stack == [] and found.links == []  # it needs nothing beside itself
    assert "10.0 GB/s" in found.text and "700 billion operations" in found.text
    for words in ("Bytes and bits by layer", "layer 1", "matmul", "0.00700"):
        assert words in found.text
    assert run("inspect", artifact, "--html", output)[0] == 0  # over the old one
    assert "0.00700" not in output.read_text("utf-8")
    code, _, err = run("inspect", artifact, "--html", tmp_path)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_sizes_are_the_manifest_s(artifact):
    manifest = Manifest.load(artifact)
    kernels = chosen_kernels(manifest.linears)
    linears = list({kernel.name: kernel for kernel in kernels}.values())
    sizes = layer_sizes(manifest, linears)
    assert sum(size.bytes for size in sizes) == manifest.parameters.bytes
    names = [size.name for size in sizes]
    layers = [name for name in names if name.startswith("layer ")]
    assert layers == [f"layer {n}" for n in range(len(layers))] and names[-len(layers) :] == layers


def test_the_floor_of_a_step_reads_weights_once():
    linears = [ChosenKernel("a", LinearSpec("amxfp4", 8, 32), "k")]
    steps = floors(linears, 1000, 10, [0, 50], Roof(1e3, 1e4, "bytes"))
    one, more, many, bound = (
        next(step for step in steps if (step.sequences, step.context) == key)
        for key in ((1, 0), (1, 50), (8, 50), (64, 0))
    )
    assert (one.bytes, more.bytes, many.bytes) == (1000, 1500, 5000)
    assert one.seconds == 1.0 and many.tokens_per_s == pytest.approx(8 / 5)
    assert many.operations == 8 * 2 * 8 * 32
    assert bound.seconds == 64 * 2 * 8 * 32 / 1e4  # more than the second that the bytes take


def test_names_of_strangers_stay_text():
    name = "<script>alert(1)</script>"
    made = page(
        name, [(name, name)], [LayerSize(name)], [([name], 1)], (name,), [], None, {name: 1}
    )
    assert "<script" not in made and made.count("&lt;script&gt;") >= 7


def test_json_is_as_before(run, artifact):
    assert json.loads(run("inspect", artifact, "--json")[1])["kind"] == "causal_lm"


@pytest.mark.slow  # `make test-browser`
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser, run, artifact, tmp_path, scheme):
    """The figures of this machine; charts are inside the page, which asks for nothing."""
    output = tmp_path / "page.html"
    assert run("inspect", artifact, "--html", output)[0] == 0
    with browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme) as opened:
        page = opened.new_page()
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.goto(output.as_uri())
        assert asked == [output.as_uri()] and not wrong
        heads = page.locator("h2").all_text_contents()
        assert heads[-1] == "Roofline of a step on this machine" and len(heads) == 3
        charts = page.locator("svg")
        assert charts.count() == 2
        for chart in charts.all():
            frame = chart.bounding_box()
            for shape in chart.locator("circle, polyline, text").all():
                box = shape.bounding_box()
                assert frame["x"] - 1 <= box["x"] and frame["y"] - 1 <= box["y"]
                assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1
                assert box["y"] + box["height"] <= frame["y"] + frame["height"] + 1
        bars = page.locator(".bar i").evaluate_all("all => all.map(one => one.clientWidth)")
        assert any(width > 0 for width in bars)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390  # a phone's
