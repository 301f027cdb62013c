"""A compiled module that is no language model: called like a function, arrays in, arrays out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from amx_tvm.artifact import Manifest
from amx_tvm.errors import ArtifactError, GenerationError
from amx_tvm.runtime.device_arrays import DeviceArray, on_gpu, taken
from amx_tvm.runtime.own_thread import OwnThread
from amx_tvm.runtime.vm import ALIGNMENT, Memory, VirtualMachine


class FunctionEngine(OwnThread):
    """A loaded module; ``engine(x, ...)`` runs its main function. Any thread may call it.

    Calls take turns on one thread that the engine owns, as a language model's do.

    Attributes
    ----------
    manifest : Manifest
        What the artifact says about itself.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        machine: VirtualMachine,
        memory: Memory,
        threads: int | None = None,
    ):
        self.path = path
        self.manifest = manifest
        self._machine = machine
        names = manifest.functions or ["main"]
        self._functions = {name: machine.function(name) for name in names}
        self._default = "main" if "main" in names else names[0]
        self._parameters = (
            [machine.load_parameters(path, manifest, memory)] if manifest.parameters.order else []
        )
        super().__init__(machine, threads)

    def __call__(self, *inputs: Any, function: str | None = None) -> Any:
        """Run a function of the module.

        Parameters
        ----------
        inputs : arrays
            NumPy arrays or anything else that speaks DLPack, of the compiled shapes and dtypes.
            Arrays in the memory of the engine's GPU are read where they are.
        function : str, optional
            Which function, where the module has several; by default "main".

        Returns
        -------
        ndarray, or tuple of ndarray where the function returns several. Where an input is in a
        GPU's memory, results are as well: a `DeviceArray`, for `torch.from_dlpack`.

        Raises
        ------
        GenerationError
            Too many or too few inputs, or one of another shape or dtype than compiled.
        """
        name = function or self._default
        if name not in self._functions:
            raise ArtifactError(
                f"the module has no function {name!r}, it has {', '.join(self._functions)}"
            )
        there = [on_gpu(x) for x in inputs]
        given = [
            taken(self._machine, place, x) if there[place] else x for place, x in enumerate(inputs)
        ]
        return self._worker.call(self._run, name, tuple(given), any(there))

    def _run(self, name: str, inputs: tuple[Any, ...], stay: bool) -> Any:
        """Run a function (on the engine's thread); results stay on the device where they should."""
        arguments = [self._argument(x) for x in inputs]
        try:
            result = self._functions[name](*arguments, *self._parameters)
        except Exception as error:
            reason = self._refusal(name, inputs, str(error))
            if reason is None:
                raise
            raise GenerationError(reason) from None
        return self._result(result, stay)

    def _argument(self, value: Any) -> Any:
        """Return an input as the function takes it: as it is where device and alignment allow."""
        if isinstance(value, np.ndarray | np.generic):
            return self._machine.to_device(np.asarray(value))
        if hasattr(value, "__dlpack__") and not on_gpu(value):
            view = np.from_dlpack(value)
            if (
                not self._machine.is_cpu
                or view.ctypes.data % ALIGNMENT
                or not view.flags.c_contiguous
            ):
                return self._machine.to_device(view)
        return value

    def _refusal(self, name: str, inputs: tuple[Any, ...], message: str) -> str | None:
        """Return what is wrong with the inputs, if that is what TVM's message is about."""
        if found := re.search(rf"function {re.escape(name)} expects (\d+) arguments", message):
            expected = int(found[1]) - len(self._parameters)
            return f"{name} takes {expected} inputs, given were {len(inputs)}"
        if found := re.search(r"loc=param\[(\d+)\], param=(\S+), annotation=(.+)\)  ", message):
            if int(found[1]) >= len(inputs):
                raise ArtifactError(
                    f"the parameters of {self.path} do not fit its library, whose {name} expects "
                    f"{found[3]}; compile the module again"
                )
            given = inputs[int(found[1])]
            kind = f"{getattr(given, 'dtype', type(given).__name__)}"
            shape = tuple(getattr(given, "shape", ()))
            return f"{name}: input {found[2]} is {kind} {shape}, expected {found[3]}"
        return None

    def _result(self, value: Any, stay: bool) -> Any:
        if hasattr(value, "__dlpack__"):
            return DeviceArray(self._machine, value) if stay else self._machine.to_host(value)
        if hasattr(value, "__len__"):
            return tuple(self._result(item, stay) for item in value)
        return value
