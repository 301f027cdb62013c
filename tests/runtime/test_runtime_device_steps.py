"""Steps whose token the device chooses: one step ahead, adopted or taken back."""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.device_steps import padded
from amx_tvm.runtime.model import Model
from amx_tvm.runtime.session import Sequence, choose_batch


class FakeCache:
    """The part of KVCache that steps of the device use, with what it was told."""

    def __init__(self, room: int = 100):
        self.log, self.room, self.length, self.under_way = [], room, 0, None
        self.sequences = []

    def available_pages(self) -> int:
        return self.room

    def forward(self, _sequences, _counts):
        self.settle()
        self.length += 1
        return self

    def ahead(self, sequences, finish):
        self.under_way, self.sequences = finish, list(sequences)
        return self

    def __enter__(self):
        return "state"

    def __exit__(self, *_):
        return None

    def adopt(self, sequences) -> bool:
        if self.under_way is None or not set(sequences) <= set(self.sequences):
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
        self.log, self.tokens = [], []

    def start(self, tokens, _records, _state):
        self.log.append(f"start {tokens}")
        self.tokens = [token + 1 for token in tokens]

    def can_follow(self, rows) -> bool:
        return rows > 1 or (rows == 1 and len(self.tokens) == 1)

    def follow(self, going, _records, _state):
        self.between = self.tokens
        self.tokens = [self.between[row] + 1 for row in going]
        self.log.append(f"follow {self.between}{'' if len(going) == len(self.between) else going}")

    def wait(self) -> list[int]:
        return [-1 if token == 100 else token for token in self.between]

    def finish(self) -> list[int]:
        return self.tokens


@pytest.fixture
def sequence():
    model = Model(None, None, vocab_size=128, context_length=20, chunk=8)
    model.steps = FakeSteps()
    return Sequence(model, FakeCache(), 0, [])


def test_a_step_runs_ahead_and_is_adopted(sequence):
    assert sequence.choose(5) == 6 and sequence.choose(6) == 7
    assert sequence._model.steps.log == ["start [5]", "follow [6]", "follow [7]"]
    assert sequence.tokens == [5, 6] and sequence._cache.length == 2


def test_another_token_takes_the_step_back(sequence):
    assert sequence.choose(5) == 6
    assert sequence.choose(9) == 10
    assert sequence._cache.log == ["taken back"]
    assert sequence._model.steps.log == ["start [5]", "follow [6]", "start [9]", "follow [10]"]


def test_rollback_takes_the_step_back(sequence):
    sequence.choose(5)
    sequence.rollback(1)
    assert sequence._cache.log == ["taken back"] and sequence._cache.length == 0
    assert sequence.choose(6) == 7  # the promised token, but nothing is under way
    assert sequence._model.steps.log[-2:] == ["start [6]", "follow [7]"]


def test_nothing_runs_ahead_without_room(sequence):
    sequence._cache.room = 0
    assert sequence.choose(5) == 6
    assert sequence._model.steps.log == ["start [5]"]


def test_the_context_ends_it(sequence):
    token = 5
    for _ in range(20):
        token = sequence.choose(token)
    with pytest.raises(GenerationError, match="context"):
        sequence.choose(token)


def test_broken_logits_are_an_error(sequence):
    with pytest.raises(GenerationError, match="NaN"):
        sequence.choose(99)


def test_a_batch_goes_on_without_those_that_have_ended(sequence):
    """Rows of the step ahead are adopted one by one; a single one starts afresh."""
    model, cache = sequence._model, sequence._cache
    batch = [sequence, *(Sequence(model, cache, i, []) for i in (1, 2))]
    assert choose_batch(batch, [5, 15, 25]) == [6, 16, 26]
    assert choose_batch(batch, [6, 16, 26], [0, 2]) == [7, 17, 27]
    left = [batch[0], batch[2]]
    assert choose_batch(left, [7, 27]) == [8, 28]
    assert choose_batch([batch[2]], [28]) == [29]
    assert choose_batch([batch[2]], [29]) == [30]
    assert model.steps.log == [
        "start [5, 15, 25]",
        "follow [6, 16, 26]",
        "follow [7, 17, 27][0, 2]",
        "follow [8, 28]",
        "start [29]",
        "follow [30]",
    ]
    assert batch[1].tokens == [15, 16] and batch[2].tokens == [25, 26, 27, 28, 29]


def test_another_token_of_one_starts_the_batch_afresh(sequence):
    other = Sequence(sequence._model, sequence._cache, 1, [])
    assert choose_batch([sequence, other], [5, 6]) == [6, 7]
    assert choose_batch([sequence, other], [6, 9]) == [7, 10]
    assert sequence._model.steps.log[-2:] == ["start [6, 9]", "follow [7, 10]"]
    assert sequence._cache.log == ["taken back"]


def test_steps_are_padded_to_the_next_size():
    assert [padded(n) for n in (1, 2, 3, 17, 256)] == [2, 2, 4, 24, 256]


def test_device_tokens_follow_the_sampler():
    from amx_tvm.runtime.sampler import Sampling

    assert Sampling().greedy and not Sampling(temperature=0.5).greedy
    assert not Sampling(repetition_penalty=1.1).greedy
    assert np.argmax([1.0, 3.0, 3.0]) == 1  # of equals the first, as the kernel's keys order them
