"""The gate that keeps the recording of a CUDA graph apart from other engines' calls."""

from __future__ import annotations

import threading

from amx_tvm.runtime.gate import Gate


def test_a_first_call_is_alone_and_later_ones_are_together():
    gate, inside, most, lock = Gate(), set(), [], threading.Lock()
    met = threading.Barrier(2, timeout=60)

    def call(name: str, wait: bool) -> str:
        with lock:
            inside.add(name)
            most.append(set(inside))
        if wait:
            met.wait()  # passes only where both are inside at once
        with lock:
            inside.discard(name)
        return name

    def engine(name: str) -> None:
        run = gate.guarded(call, records=True)
        for _ in range(50):
            assert run(f"{name} records", False) == f"{name} records"
            run = gate.guarded(call, records=True)
        met.wait()  # nobody records any more
        gate.guarded(call)(name, True)

    threads = [threading.Thread(target=engine, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert {"a", "b"} in most
    assert all(len(names) == 1 for names in most if any("records" in n for n in names))


def test_an_error_leaves_the_gate_open():
    gate = Gate()

    def fail() -> None:
        raise RuntimeError("broken")

    run = gate.guarded(fail, records=True)
    for _ in range(2):  # the second call is alone too: nothing was recorded
        try:
            run()
        except RuntimeError as error:
            assert str(error) == "broken"
    with gate.alone():
        pass
