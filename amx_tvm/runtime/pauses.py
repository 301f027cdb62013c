"""A call that lets others run between its kernels: a CPU's chunk of a prompt, beside decode steps.

TVM's virtual machine tells an instrument of every call that it makes. A machine of its own has one,
so that the engine's machine can run steps of other sequences meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amx_tvm.runtime.vm import VirtualMachine

_BUILTIN = "vm.builtin."  # what takes no time, but for the cache's
_ATTENTION = "vm.builtin.attention_kv_cache_attention_with_fused_qkv"
_GO_ON = 0  # tvm.relax's VMInstrumentReturnKind.NO_OP


class Pausing:
    """A compiled function that calls something in front of each kernel.

    Parameters
    ----------
    machine : VirtualMachine
        Whose executable it is of.
    name : str
        The function's name.
    """

    def __init__(self, machine: VirtualMachine, name: str):
        looks = self._looks = list[Callable[[], None]]()  # of the call under way

        def instrument(_function: Any, called: str, before: bool, *_: Any) -> int:
            if before and (called == _ATTENTION or not called.startswith(_BUILTIN)) and looks:
                looks[-1]()
            return _GO_ON

        self._function = machine.instrumented(instrument)[name]

    def __call__(self, look: Callable[[], None], *arguments: Any) -> Any:
        """Call the function with these arguments, and ``look`` between its kernels."""
        self._looks.append(look)
        try:
            return self._function(*arguments)
        finally:
            self._looks.clear()
