"""How chunks of prompts are sized: by the clock, which a test may set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from amx_tvm.server import pace

QUIET = 0.010  # seconds of a step of eight


class Steps:
    """What `Pace` steps: a prompt's rows, or the next tokens of eight, in so many seconds."""

    def __init__(self):
        self.turns = SimpleNamespace(most=512, last=(0, 0), limit=None)
        self.now = 0.0
        token_ids = [0] * 20
        handle = SimpleNamespace(result=SimpleNamespace(token_ids=token_ids))
        self.decoding = [(handle, 1)] * 8
        self.seconds, self.filling = QUIET, False

    def step(self):
        rows = self.turns.limit(self.decoding) if self.filling else 0
        self.turns.last = (0 if rows else 8, rows)
        self.now += self.seconds * rows if rows else self.seconds
        return True


@pytest.fixture
def steps(monkeypatch):
    made = Steps()
    monkeypatch.setattr(pace.time, "perf_counter", lambda: made.now)
    return made


@pytest.mark.parametrize("held_up", [False, True])
def test_a_chunk_keeps_the_pace(steps, held_up):
    """Also behind a step that the machine held up."""
    paced = pace.Pace(steps)
    for _ in range(50):
        paced.step()
    if held_up:
        steps.seconds = 30 * QUIET
        paced.step()
        steps.seconds = QUIET
    sizes = []
    for _ in range(12):
        steps.filling, steps.seconds = True, QUIET / 16  # a row
        paced.step()
        sizes.append(steps.turns.last[1])
        steps.filling, steps.seconds = False, QUIET
        paced.step()
    assert 8 <= sizes[-1] <= 24 and max(sizes) <= 24
    assert min(sizes[-2:]) * QUIET / 16 + QUIET < 3 * QUIET
