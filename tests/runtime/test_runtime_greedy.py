"""Steps whose token the device chooses: one step ahead, adopted or taken back."""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.model import Model
from amx_tvm.runtime.session import Sequence


class FakeCache:
    """The part of KVCache that greedy steps use, with what it was told."""

    def __init__(self, room: int = 100):
        self.log, self.room, self.length, self.under_way = [], room, 0, None

    def available_pages(self) -> int:
        return self.room

    def forward(self, _sequences, _counts):
        self.settle()
        self.length += 1
        return self

    def ahead(self, _sequence, finish):
        self.under_way = finish
        return self

    def __enter__(self):
        return "state"

    def __exit__(self, *_):
        return None

    def adopt(self, _sequence) -> bool:
        if self.under_way is None:
            return False
        self.under_way, self.length = None, self.length + 1
        return True

    def settle(self) -> None:
        if self.under_way is not None:
            self.under_way()
            self.under_way = None
            self.log.append("taken back")

    def rollback(self, _sequence, count) -> None:
        self.settle()
        self.length -= count


class FakeSteps:
    """A device whose next token is one more; 99 is followed by broken logits."""

    def __init__(self):
        self.log, self.token = [], None

    def start(self, token, _state):
        self.log.append(f"start {token}")
        self.token = token + 1

    def follow(self, _state):
        self.between, self.token = self.token, self.token + 1
        self.log.append(f"follow {self.between}")

    def wait(self) -> int:
        return -1 if self.between == 100 else self.between

    def finish(self) -> int:
        return self.token


@pytest.fixture
def sequence():
    model = Model(None, None, vocab_size=128, context_length=20, chunk=8)
    model.greedy = FakeSteps()
    return Sequence(model, FakeCache(), 0, [])


def test_a_step_runs_ahead_and_is_adopted(sequence):
    assert sequence.choose(5) == 6 and sequence.choose(6) == 7
    assert sequence._model.greedy.log == ["start 5", "follow 6", "follow 7"]
    assert sequence.tokens == [5, 6] and sequence._cache.length == 2


def test_another_token_takes_the_step_back(sequence):
    assert sequence.choose(5) == 6
    assert sequence.choose(9) == 10
    assert sequence._cache.log == ["taken back"]
    assert sequence._model.greedy.log == ["start 5", "follow 6", "start 9", "follow 10"]


def test_rollback_takes_the_step_back(sequence):
    sequence.choose(5)
    sequence.rollback(1)
    assert sequence._cache.log == ["taken back"] and sequence._cache.length == 0
    assert sequence.choose(6) == 7  # the promised token, but nothing is under way
    assert sequence._model.greedy.log[-2:] == ["start 6", "follow 7"]


def test_nothing_runs_ahead_without_room(sequence):
    sequence._cache.room = 0
    assert sequence.choose(5) == 6
    assert sequence._model.greedy.log == ["start 5"]


def test_the_context_ends_it(sequence):
    token = 5
    for _ in range(20):
        token = sequence.choose(token)
    with pytest.raises(GenerationError, match="context"):
        sequence.choose(token)


def test_broken_logits_are_an_error(sequence):
    with pytest.raises(GenerationError, match="NaN"):
        sequence.choose(99)


def test_device_tokens_follow_the_sampler():
    from amx_tvm.runtime.sampler import Sampling

    assert Sampling().greedy and not Sampling(temperature=0.5).greedy
    assert not Sampling(repetition_penalty=1.1).greedy
    assert np.argmax([1.0, 3.0, 3.0]) == 1  # of equals the first, as the kernel's keys order them
