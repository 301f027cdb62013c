"""The memory of a step's integers: any length, again and again, on a device of its own or not."""

from __future__ import annotations

import numpy as np
import pytest

import amx_tvm.runtime
from amx_tvm.runtime.inputs import Vector
from amx_tvm.runtime.vm import VirtualMachine, aligned


def play_gpu(machine, monkeypatch):
    """Let a CPU's machine act as a GPU's: copies from pinned memory wait until it works.

    Returns a list that counts what the host waited for: copies from memory that is not pinned.
    """
    waiting, waited = [], []
    function, builtin, from_bytes = machine.function, machine.builtin, machine._from_bytes

    def work():
        for stage, tensor in waiting:
            np.from_dlpack(tensor)[:] = np.from_dlpack(stage)
        waiting.clear()

    def working(called):
        def run(*arguments):
            work()
            return called(*arguments)

        return run

    def mailbox(*shape):
        memory = aligned(np.zeros(shape, np.int32))
        return machine._ffi.from_dlpack(memory), memory

    def copy(stage, tensor):
        waiting.append((stage, tensor))

    def counted(*arguments):
        waited.append(arguments)
        return from_bytes(*arguments)

    changes = {
        "is_cpu": False,
        "mailbox": mailbox,
        "function": lambda name: working(function(name)),
        "builtin": lambda name: copy if name.endswith("CopyFromTo") else builtin(name),
        "to_host": working(machine.to_host),
        "_from_bytes": counted,
    }
    for name, value in changes.items():
        monkeypatch.setattr(machine, name, value)
    return waited


@pytest.mark.parametrize("shares", [True, False])
def test_every_step_gets_what_it_put(artifact, shares, monkeypatch):
    machine = VirtualMachine(artifact / "lib.so", "cpu")
    if not shares:
        play_gpu(machine, monkeypatch)
    vector = Vector(machine)
    for count in (0, 1, 5, 1, 40, 5, *range(300)):
        values = np.arange(count) + count
        given = vector.put(values if count % 2 else values.tolist())
        found = machine.to_host(given)
        assert found.dtype == np.int32 and found.tolist() == values.tolist()
        assert given.data_ptr() % 64 == 0


def test_a_gpu_waits_for_no_copy_of_a_prompt(artifact, monkeypatch):
    """Ids and rows whose logits are wanted are both copied from pinned memory."""
    prompts = [np.random.default_rng(seed).integers(1, 300, 40).tolist() for seed in range(3)]
    engine = amx_tvm.runtime.load(artifact, kv_tokens=512)
    expected = [engine.logits(prompt) for prompt in prompts]
    model = engine._model
    waited = play_gpu(model._machine, monkeypatch)
    model._ids, model._picks = Vector(model._machine), Vector(model._machine)
    model._functions.clear()
    counts = []
    for prompt, logits in zip(prompts, expected, strict=True):
        np.testing.assert_array_equal(engine.logits(prompt), logits)
        counts.append(len(waited))
    assert counts[0] == counts[-1]  # memory is made once
