"""The memory of a step's integers: any length, again and again, on a device of its own or not."""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm.runtime.inputs import Vector
from amx_tvm.runtime.vm import VirtualMachine


@pytest.mark.parametrize("shares", [True, False])
def test_every_step_gets_what_it_put(artifact, shares):
    machine = VirtualMachine(artifact / "lib.so", "cpu")
    machine.is_cpu = shares  # or copies, as if the device had memory of its own
    vector = Vector(machine)
    for count in (1, 5, 1, 40, 5, *range(1, 300)):
        values = np.arange(count) + count
        given = vector.put(values if count % 2 else values.tolist())
        found = machine.to_host(given)
        assert found.dtype == np.int32 and found.tolist() == values.tolist()
        assert given.data_ptr() % 64 == 0
