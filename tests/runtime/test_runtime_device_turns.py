"""A scheduler over a device that chooses tokens: prompts take turns with its steps."""

from __future__ import annotations

import numpy as np
import pytest

import amx_tvm.runtime


class HostSteps:
    """Steps as a GPU's, one ahead, computed by the CPU's own function: its most likely tokens."""

    def __init__(self, model):
        self.model, self.tokens, self.log = model, [], []

    def _run(self, tokens, arguments):
        model, machine, rows = self.model, self.model._machine, range(len(tokens))
        given = model._ids.put(tokens), model._picks.put(list(rows))
        logits = machine.function("forward")(*given, *arguments, model._parameters)
        return machine.to_host(logits).argmax(axis=1).tolist()

    def start(self, tokens, _choices, arguments, masks=()):
        self.log.append(("start", len(tokens)))
        self.tokens = self._run(tokens, arguments)

    def can_follow(self, rows):
        return rows > 0

    def follow(self, going, _choices, arguments):
        self.log.append(("follow", len(going)))
        self.between = self.tokens
        self.tokens = self._run([self.between[row] for row in going], arguments)

    def wait(self):
        return self.between

    def finish(self):
        return self.tokens

    def told(self, _row, token, _choice):
        return token


@pytest.fixture
def device(artifact, monkeypatch):
    engine = amx_tvm.runtime.load(artifact, kv_tokens=2048)
    expected = [engine.generate(p, **OPTIONS).token_ids for p in PROMPTS]
    model = engine._model
    steps = HostSteps(model)
    for name, value in {"chooses": 8, "clusters": True, "steps": steps}.items():
        monkeypatch.setitem(model.__dict__, name, value)
    forward, calls = model.forward, []

    def noted(cache, sequences, lengths, tokens, wanted, look):
        steps.log.append(("forward", sum(wanted)))
        calls.append(list(lengths))
        return forward(cache, sequences, lengths, tokens, wanted, look)

    monkeypatch.setattr(model, "forward", noted)
    return engine, steps, calls, expected


OPTIONS = {"max_new_tokens": 14, "ignore_eos": True}
PROMPTS = [
    np.random.default_rng(seed).integers(1, 300, size).tolist()
    for seed, size in enumerate((5, 40, 90, 17))
]


def test_prompts_that_join_take_turns_with_steps_of_the_device(device):
    engine, steps, calls, expected = device
    with engine.scheduler(prefill_rows=16) as scheduler:
        handles = [scheduler.add(engine.request(PROMPTS[0], **OPTIONS))]
        for _ in range(3):
            scheduler.step()
        handles += [scheduler.add(engine.request(p, **OPTIONS)) for p in PROMPTS[1:]]
        while scheduler.step():
            pass
    assert [handle.result.token_ids for handle in handles] == expected
    # Whoever decodes has its tokens chosen by the device: a call for prompts brings the logits of
    # prompts that end in it alone.
    brought = sum(count for what, count in steps.log if what == "forward")
    assert brought == len(PROMPTS) and all(sum(lengths) <= 16 for lengths in calls[1:])
    turns = [("forward", 0), ("start", 1), ("forward", 0), ("start", 1), ("forward", 1)]
    assert steps.log[4:9] == turns
    assert steps.log[-2:] == [("follow", 2), ("follow", 1)]  # a step is ahead again
