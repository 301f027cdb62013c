"""How chunks of prompts are sized: by the clock, which a test may set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from amx_tvm.server import pace

QUIET = 0.010  # seconds of a step of eight


class Steps:
    """What `Pace` steps: a prompt's rows, or the next tokens of eight, in so many seconds."""

    def __init__(self):
        self.turns = SimpleNamespace(most=512, last=(0, 0), limit=None, go_on=self.went_on)
        self.again, self.slow = 0, 1
        self.now = 0.0
        token_ids = [0] * 20
        handle = SimpleNamespace(result=SimpleNamespace(token_ids=token_ids))
        self.decoding = [(handle, 1)] * 8
        self.seconds, self.filling = QUIET, False
        self.fixed = 0  # rows whose time a chunk takes beside its own
        self.pauses, self.within = False, []  # when steps ran within a chunk

    def step(self):
        rows = self.turns.limit(self.decoding) if self.filling else 0
        self.turns.last = (0 if rows else 8, rows)
        parts = 30 if self.pauses and rows else 1
        for _ in range(parts):
            self.turns.between(self.one) if parts > 1 else None
            self.now += self.seconds * ((rows + self.fixed) if rows else 1) / parts
        return True

    def went_on(self):
        self.again += 1

    def one(self):
        self.now += self.slow * QUIET
        self.within.append(self.now)
        return 8


@pytest.fixture
def steps(monkeypatch):
    made = Steps()
    monkeypatch.setattr(pace.time, "perf_counter", lambda: made.now)
    return made


@pytest.mark.parametrize("held_up", [False, True])
def test_a_chunk_keeps_the_pace(steps, held_up):
    """Also behind a step that the machine held up."""
    paced = pace.Pace(steps, lambda: None)
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
    assert 24 <= sizes[-1] <= 32 and max(sizes) <= 48
    assert sizes[-1] * QUIET / 16 + QUIET < 3.3 * QUIET


def test_large_chunks_pause_for_others(steps):
    """The rows of a chunk that takes five quiet steps; each of its 30 kernels a sixth of one."""
    told = []
    paced = pace.Pace(steps, lambda: told.append(steps.now))
    for _ in range(50):
        paced.step()
    steps.pauses = steps.filling = True
    steps.seconds = 5 * QUIET / 64
    begun = steps.now
    paced.step()
    assert steps.turns.last == (0, 64) and told == steps.within and len(told) == 3
    assert steps.again == 1  # the next chunk follows: there is time left
    paced.step()
    gaps = [b - a for a, b in zip([begun, *told], told, strict=False)]
    assert len(gaps) == 7
    assert max(gaps) < 2.5 * QUIET and min(gaps) > 2 * QUIET
    steps.slow = 3  # the machine: what was quiet is no measure
    for _ in range(20):
        paced.step()
    gaps = [b - a for a, b in zip(told[-4:], told[-3:], strict=False)]
    assert min(gaps) > 1.4 * 3 * QUIET
    steps.filling, steps.pauses, steps.seconds = False, False, QUIET
    paced.step()  # as ever without a prompt
    assert steps.turns.last == (8, 0)


def test_chunks_follow_what_a_row_takes(steps):
    """Rows cost more and more behind a prompt that grows: chunks shrink, the pace stays."""
    paced = pace.Pace(steps, lambda: None)
    for _ in range(20):
        paced.step()
    seconds, sizes, steps.fixed = [], [], 4
    for i in range(120):
        steps.filling, steps.seconds = True, (1 + i / 60) * QUIET / 20
        paced.step()
        sizes.append(steps.turns.last[1])
        seconds.append((sizes[-1] + 4) * steps.seconds + QUIET)
        steps.filling, steps.seconds = False, QUIET
        paced.step()
    assert sizes[10] >= 32 and sizes[-1] == 8 and sizes[10:] == sorted(sizes[10:], reverse=True)
    assert max(seconds[10:]) < 3.4 * QUIET
