"""Kernels are divided among modules the same way everywhere, and what a thread raises comes out."""

from __future__ import annotations

import threading

import pytest

tvm = pytest.importorskip("tvm")

from relax_passes import machine_code  # noqa: E402

from .modules import Loops, Planned  # noqa: E402


def functions():
    """Five functions by name, of two sizes and more."""
    found = {f"loops_{g.name_hint}": f for g, f in Loops.functions_items()}
    scale = next(f for g, f in Planned.functions_items() if g.name_hint == "scale")
    found |= {f"scale_{i}": scale for i in range(3)}
    return {n: f.with_attr("global_symbol", n) for n, f in found.items()}


def names(module):
    return [sorted(g.name_hint for g in part.get_global_vars()) for part in module]


def test_parts_hold_every_function_once_in_any_order():
    made = functions()
    parts = names(machine_code.parts(tvm.IRModule(made)))
    assert len(parts) == machine_code.PARTS and all(parts)
    assert sorted(sum(parts, [])) == sorted(made)
    turned = dict(reversed(made.items()))
    assert names(machine_code.parts(tvm.IRModule(turned))) == parts


def test_few_functions_make_few_parts():
    name, function = next(iter(functions().items()))
    assert names(machine_code.parts(tvm.IRModule({name: function}))) == [[name]]


def test_threads_have_the_options_of_who_asks():
    def level(_):
        return tvm.transform.PassContext.current().opt_level, threading.get_ident()

    with tvm.transform.PassContext(opt_level=1):
        found = machine_code.in_threads(level, range(3))
    assert [one for one, _ in found] == [1, 1, 1]
    assert threading.get_ident() not in {thread for _, thread in found}


def test_an_error_in_a_thread_comes_out():
    def work(item):
        if item == 1:
            raise ValueError("part 1")
        return item

    with pytest.raises(ValueError, match="part 1"):
        machine_code.in_threads(work, range(4))
