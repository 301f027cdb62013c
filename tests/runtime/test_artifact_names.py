"""Names out of files are not paths: whatever a model is called, its artifact goes inside dist/."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from amx_tvm.artifact.names import default_output


@given(name=st.text(max_size=400))
@example("../../escaped")
@example("/absolute/place")
@example("..")
@example("a\0b")
@example("a\nb")
@example("名" * 300)
@example("\ud800")
def test_any_name_stays_inside_dist(name):
    place = default_output(name, "amxfp4-strict")
    assert place.parent == Path("dist") and place.name.endswith("-amxfp4-strict")
    assert not place.name.startswith((".", "-")) and place.name.isprintable()
    # The writer's hidden sibling has a longer name, and it must fit too.
    assert len(f".{place.name}.partial-4194304".encode()) < 255


@pytest.mark.parametrize(
    "name, directory",
    [
        ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("Qwen2.5 Coder 0.5B", "Qwen2.5-Coder-0.5B"),
        ("owner/model", "owner-model"),
        ("~/x", "x"),
        ("-rf", "rf"),
        ("dist/../../up", "dist-..-..-up"),
        ("..", "model"),
        ("", "model"),
    ],
)
def test_what_is_kept_of_a_name(name, directory):
    assert default_output(name, "none") == Path("dist") / f"{directory}-none"
