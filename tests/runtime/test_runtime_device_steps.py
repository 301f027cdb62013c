"""Steps whose token the device chooses: one step ahead, adopted or taken back."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.choices import CHOICE, RowChoice
from amx_tvm.runtime.device_steps import padded
from amx_tvm.runtime.device_tables import DeviceTables
from amx_tvm.runtime.model import Model
from amx_tvm.runtime.options import Sampling
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

    def start(self, tokens, _choices, _state, masks=()):
        self.log.append(f"start {tokens}{' masked' if masks else ''}")
        self.tokens = [token + 1 for token in tokens]

    def can_follow(self, rows) -> bool:
        return rows > 1 or (rows == 1 and len(self.tokens) == 1)

    def follow(self, going, _choices, _state):
        self.between = self.tokens
        self.tokens = [self.between[row] + 1 for row in going]
        self.log.append(f"follow {self.between}{'' if len(going) == len(self.between) else going}")

    def wait(self) -> list[int]:
        return [-1 if token == 100 else token for token in self.between]

    def finish(self) -> list[int]:
        return self.tokens

    def told(self, _row, token, _choice) -> int:
        return token


@pytest.fixture
def sequence():
    machine = SimpleNamespace(is_cpu=True)  # of which nothing else is asked
    model = Model(machine, None, vocab_size=128, context_length=20, chunk=8)
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


def test_nothing_runs_ahead_of_a_mask(sequence):
    """What a mask allows depends on the token before it."""
    assert choose_batch([sequence], [5], masks=[None]) == [6]
    mask = np.zeros(4, np.int32)
    assert choose_batch([sequence], [6], masks=[mask]) == [7]
    assert choose_batch([sequence], [7], masks=[mask]) == [8]
    assert sequence._model.steps.log == [
        "start [5]",
        "follow [6]",
        "start [6] masked",
        "start [7] masked",
    ]


class Memory:
    """A device whose memory is NumPy's."""

    def __init__(self):
        self.written = 0

    def to_device(self, array):
        return array.copy()

    def write(self, tensor, row, array):
        self.written += 1
        tensor[row : row + len(array)] = array


def place_of(choice, name, masked=None):
    return int(np.frombuffer(choice.record(masked), CHOICE)[0][name])


def test_tables_hold_what_a_step_refers_to():
    memory = Memory()
    tables = DeviceTables(memory, vocab := 40)
    prompt, made = [3, 3, 4], [7, 7, 3]
    penalized = RowChoice(Sampling(presence_penalty=1.0), None, prompt, made)
    biased = [RowChoice(Sampling(logit_bias={n: 1.5, 9: -2.0}), None) for n in (1, 2)]
    plain = RowChoice(Sampling(), None)
    tables.place([plain, penalized, *biased])
    counts, _, biases = tables.arguments
    row = counts[place_of(penalized, "counts")]
    assert np.flatnonzero(row).tolist() == [3, 4, 7]
    assert (row[[3, 4, 7]] & 0x7FFFFFFF).tolist() == [1, 0, 2] and row[3] < 0 and row[7] > 0
    for choice, first in zip(biased, (1, 2), strict=True):
        where = place_of(choice, "bias_first")
        assert biases[where : where + 2, 0].tolist() == [first, 9]
    assert vocab == counts.shape[1] and memory.written == 2


def test_counts_are_written_where_the_device_has_others():
    memory, made = Memory(), [1]
    tables = DeviceTables(memory, 40)
    choice = RowChoice(Sampling(frequency_penalty=1.0), None, [2], made)
    tables.place([choice])
    choice.record()  # a step: the device counts its token
    made.append(5)
    choice.record()  # the one ahead of it
    made.append(6)
    tables.place([choice])
    assert memory.written == 1
    choice.record()  # another ahead, which is thrown away
    tables.place([choice])
    assert memory.written == 2
    made.append(7)  # chosen elsewhere
    tables.place([choice])
    assert memory.written == 3 and tables.arguments[0][0, [1, 5, 6, 7]].tolist() == [1, 1, 1, 1]


def test_tables_grow_and_places_are_used_again():
    memory = Memory()
    tables = DeviceTables(memory, 40)
    options = Sampling(repetition_penalty=1.1)
    choices = [RowChoice(options, None, [i], [i + 20]) for i in range(3)]
    tables.place(choices[:1])
    tables.place(choices)
    slots = [place_of(choice, "counts") for choice in choices]
    counts = tables.arguments[0]
    assert sorted(slots) == [0, 1, 2] and len(counts) == 4
    assert all(counts[slot, i + 20] == 1 for i, slot in enumerate(slots))
    gone = slots[1]
    del choices[1]
    tables.place([*choices, new := RowChoice(options, None, [9], [])])
    assert place_of(new, "counts") in {gone, 3} and len(tables.arguments[0]) == 4


def test_masks_go_to_the_first_places():
    tables = DeviceTables(Memory(), 64)
    masks = [None, np.array([1, 2], np.int32), None, np.array([3, 4], np.int32)]
    assert tables.allow(masks) == [None, 0, None, 1]
    assert tables.arguments[1][:2].tolist() == [[1, 2], [3, 4]]
    assert tables.allow([None]) == [None]
