"""Arrays that stay on a GPU: what others made goes in, and comes out, without a copy or a wait.

Compiled functions run on CUDA's default stream. Who gives or takes an array through DLPack says on
which stream it works (`the protocol <https://dmlc.github.io/dlpack/latest/python_spec.html>`_);
streams are made to wait for each other on the device, the host goes on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.vm import VirtualMachine

CUDA = 2  # DLPack's kDLCUDA
DEFAULT_STREAM = 1  # DLPack's name of CUDA's default stream, which has the handle 0


def on_gpu(value: Any) -> bool:
    """Whether a value is an array in a GPU's memory."""
    return hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) == CUDA


class DeviceArray:
    """A result in a GPU's memory, which `torch.from_dlpack` and others take as it is.

    Attributes
    ----------
    shape : tuple of int
        Its sizes.
    dtype : str
        Such as "float32".
    """

    def __init__(self, machine: VirtualMachine, tensor: Any):
        self._machine, self._tensor = machine, tensor
        self.shape = tuple(int(n) for n in tensor.shape)
        self.dtype = str(tensor.dtype)

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype} {self.shape}>"

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self._tensor.__dlpack_device__()
        return int(kind), int(index)

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        """Return the array for a consumer whose stream waits for what makes the array."""
        if stream not in (None, -1, 0, DEFAULT_STREAM):
            self._machine.order(0, stream)
        return self._tensor.__dlpack__(**options)

    def numpy(self) -> np.ndarray:
        """Return a copy in the host's memory."""
        return self._machine.to_host(self._tensor)


class _Ordered:
    """An array whose maker has made the default stream wait for it."""

    def __init__(self, value: Any):
        self._value, self._capsule = value, value.__dlpack__(stream=DEFAULT_STREAM)

    def __dlpack_device__(self) -> Any:
        return self._value.__dlpack_device__()

    def __dlpack__(self, **_options: Any) -> Any:
        return self._capsule


def taken(machine: VirtualMachine, place: int, value: Any) -> Any:
    """Return an array of a GPU as a tensor of the machine's, called where its maker's stream is.

    Raises
    ------
    GenerationError
        For an array of another device, or one with gaps between its elements.
    """
    if isinstance(value, DeviceArray):
        return value._tensor
    device = tuple(int(n) for n in value.__dlpack_device__())
    if device != machine.dlpack_device:
        expected = "the CPU" if machine.is_cpu else f"cuda:{machine.dlpack_device[1]}"
        raise GenerationError(
            f"input {place} is on cuda:{device[1]}, the engine on {expected}; move it there, or "
            "load the engine on its device"
        )
    try:
        return machine.from_dlpack(_Ordered(value))
    except (BufferError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GenerationError(
            f"input {place} cannot be read where it is ({reason}); give a contiguous copy that "
            "needs no gradient"
        ) from None
