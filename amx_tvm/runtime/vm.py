"""One loaded executable: its functions, its parameters on the device, arrays in and out.

The virtual machine takes DLPack arrays. On the CPU nothing is copied: NumPy arrays go in and the
results are viewed as NumPy arrays. On CUDA, inputs and parameters are copied to the device and
results back to the host.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np

from amx_tvm.artifact import Manifest, open_parameters
from amx_tvm.artifact.memory import huge_pages_fit
from amx_tvm.errors import ArtifactError, TargetError
from amx_tvm.runtime.gate import GPU
from amx_tvm.runtime.library import load_runtime

POOLED_ALLOCATOR = 2  # tvm.runtime.vm.VirtualMachine.POOLED_ALLOCATOR
_DLPACK_DEVICES = {"cpu": 1, "cuda": 2}
Memory = Literal["auto", "map", "huge"]
_PINNED = 3  # DLPack's kDLCUDAHost
_EXISTS, _COMPUTE_VERSION, _FREE_MEMORY = 0, 4, 15  # tvm.runtime.Device: DeviceAttrKind

ALIGNMENT = 64  # bytes that TVM's code may assume of a tensor's first element


def free_memory(device: str) -> int | None:
    """Return the bytes that are free on a GPU, "cuda" or "cuda:<index>"; None where unknown."""
    name, _, index = device.partition(":")
    if name == "cpu":
        return None
    ask = load_runtime(name).get_global_func("runtime.GetDeviceAttr")
    found = ask(_DLPACK_DEVICES[name], int(index or 0), _FREE_MEMORY)
    return None if found is None else int(found)


class VirtualMachine:
    """TVM's virtual machine on one device.

    Parameters
    ----------
    library : Path
        The artifact's shared library.
    device : str
        "cpu", "cuda" or "cuda:<index>".
    features : sequence of str
        On CUDA the architecture that the library's machine code is for, such as ("sm_90a",).
    """

    def __init__(self, library: Path, device: str = "cpu", features: Sequence[str] = ()):
        name, _, index = device.partition(":")
        if name not in _DLPACK_DEVICES or not (index.isdigit() or not index):
            raise TargetError(f"device is {device!r}, expected cpu, cuda or cuda:<index>")
        self.is_cpu, self.features = name == "cpu", tuple(features)
        ffi = self._ffi = load_runtime(name)
        self._device = ffi.device(name, int(index or 0))
        self.dlpack_device = (_DLPACK_DEVICES[name], int(index or 0))
        if not self.is_cpu:
            attribute = ffi.get_global_func("runtime.GetDeviceAttr")
            _check_gpu(
                device,
                lambda kind: attribute(_DLPACK_DEVICES[name], int(index or 0), kind),
                features,
            )
        try:
            self._executable = _opened(_name_of(Path(library).resolve()), ffi)
            self._machine = self._started()
        except (RuntimeError, OSError, AttributeError) as error:
            reason = (str(error).splitlines() or [""])[-1]
            raise ArtifactError(
                f"{library} cannot be loaded ({reason}); compile the model again"
            ) from error
        self._allocate = self.builtin("runtime.TVMTensorAllocWithScope")
        self._view = self.builtin("runtime.TVMTensorCreateView")
        self._from_bytes = self.builtin("runtime.TVMTensorCopyFromBytes")
        self._to_bytes = self.builtin("runtime.TVMTensorCopyToBytes")

    def _started(self) -> Any:
        """Return a machine of TVM for the executable."""
        machine = self._executable.module["vm_load_executable"]()
        arguments = [*self.dlpack_device, POOLED_ALLOCATOR]
        if not self.is_cpu:  # shape functions run on the host
            arguments += [_DLPACK_DEVICES["cpu"], 0, POOLED_ALLOCATOR]
        machine["vm_initialization"](*arguments)
        return machine

    def instrumented(self, instrument: Callable[..., int]) -> Any:
        """Return another machine of the executable that tells ``instrument`` of all its calls."""
        machine = self._started()
        machine["set_instrument"](self._ffi.convert(instrument))
        return machine

    def function(self, name: str) -> Any:
        """Return a compiled function; ArtifactError if the library has none of that name."""
        try:
            found = self._machine[name]
        except (AttributeError, RuntimeError) as error:
            raise ArtifactError(
                f"the library has no function {name!r}; compile the model again"
            ) from error
        return found if self.is_cpu else GPU.guarded(found, records=True)

    def builtin(self, name: str) -> Any:
        """Return a global function of TVM's runtime, such as ``vm.builtin.kv_state_popn``."""
        found = self._ffi.get_global_func(name)
        return found if self.is_cpu else GPU.guarded(found)

    def release(self) -> None:
        """Give memory back that TVM's allocator keeps for buffers of the sizes that it has seen."""
        self.builtin("vm.builtin.memory_manager.clear")()

    def shape(self, values: Iterable[int]) -> Any:
        """Return a tvm_ffi Shape."""
        return self._ffi.Shape(tuple(values))

    def to_device(self, array: np.ndarray) -> Any:
        """Return an array as a tensor of the device: on the CPU a view, if it is aligned."""
        if self.is_cpu:
            return self._ffi.from_dlpack(aligned(array))
        array = contiguous(array)
        dtype = self._ffi.dtype(array.dtype.name)
        tensor = self._allocate(self.shape(array.shape), dtype, self._device, None)
        self._from_bytes(tensor, self._pointer(array), array.nbytes)
        return tensor

    def from_dlpack(self, value: Any) -> Any:
        """Return a contiguous array of the device as a tensor, without a copy.

        Raises
        ------
        BufferError, RuntimeError, ValueError
            TVM's or the maker's reason not to.
        """
        return self._ffi.from_dlpack(
            value, require_alignment=ALIGNMENT if self.is_cpu else 16, require_contiguous=True
        )

    def order(self, first: int, then: int) -> None:
        """Let what a stream of the GPU does from now on wait for what another one is to do."""
        self.builtin("runtime.Device_StreamSyncFromTo")(self._device, first, then)

    def tuple_of(self, tensors: Sequence[Any]) -> Any:
        """Return tensors as one argument of a compiled function."""
        return self._ffi.convert(list(tensors))

    def rows_of(self, tensor: Any) -> np.ndarray:
        """Return a tensor of the host's memory as uint8 [rows, bytes], to write into."""
        size = math.prod(tensor.shape) * np.dtype(str(tensor.dtype)).itemsize
        memory = (ctypes.c_uint8 * size).from_address(tensor.data_ptr())
        return np.ctypeslib.as_array(memory).reshape(int(tensor.shape[0]), -1)

    def view(self, tensor: Any, shape: Sequence[int]) -> Any:
        """Return the first elements of a tensor of the device in a shape."""
        dtype = self._ffi.dtype(str(tensor.dtype))
        return self._view(tensor, self.shape(shape), dtype, 0)

    def row(self, tensor: Any, row: int) -> Any:
        """Return one row of a tensor of the device."""
        dtype, shape = str(tensor.dtype), [1, *tensor.shape[1:]]
        offset = row * math.prod(shape) * np.dtype(dtype).itemsize
        return self._view(tensor, self.shape(shape), self._ffi.dtype(dtype), offset)

    def write(self, tensor: Any, row: int, array: np.ndarray) -> None:
        """Copy an array over the rows of a tensor of the device, from ``row`` on."""
        array = np.ascontiguousarray(array)
        dtype, size = self._ffi.dtype(str(tensor.dtype)), array[0].nbytes
        part = self._view(tensor, self.shape(array.shape), dtype, row * size)
        self._from_bytes(part, self._pointer(array), array.nbytes)

    def to_host(self, tensor: Any, rows: int | None = None) -> np.ndarray:
        """Return a result, or its first rows: a view on the CPU, a copy elsewhere."""
        if self.is_cpu:
            array = np.from_dlpack(tensor)
            return array if rows is None else array[:rows]
        if rows is not None and rows != tensor.shape[0]:
            tensor = self.view(tensor, [rows, *tensor.shape[1:]])
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        self._to_bytes(tensor, self._pointer(array), array.nbytes)
        return array

    def mailbox(self, *shape: int, dtype: str = "int32") -> tuple[Any, np.ndarray]:
        """Return a tensor of four-byte numbers that the device copies from and to, and a view."""
        host = self._ffi.Device(_PINNED, 0)
        tensor = self._allocate(self.shape(shape), self._ffi.dtype(dtype), host, None)
        memory = (ctypes.c_int32 * math.prod(shape)).from_address(tensor.data_ptr())
        return tensor, np.ctypeslib.as_array(memory).reshape(shape).view(dtype)

    @staticmethod
    def _pointer(array: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    def load_parameters(self, directory: Path, manifest: Manifest, memory: Memory = "auto") -> Any:
        """Return the parameter tuple that every function takes last.

        ``memory`` says where the CPU reads the weights from: the mapped file ("map"), a copy in
        huge pages ("huge"), or "auto": huge pages where the machine has them and has room.
        """
        if memory not in ("auto", "map", "huge"):
            raise ArtifactError(f"memory is {memory!r}, expected 'auto', 'map' or 'huge'")
        size = sum(shard.bytes for shard in manifest.parameters.shards)
        huge = self.is_cpu and (memory == "huge" or (memory == "auto" and huge_pages_fit(size)))
        arrays = open_parameters(directory, manifest.parameters, huge)
        tensors = [self.to_device(arrays[name]) for name in manifest.parameters.order]
        return self.tuple_of(tensors)


class _Executable:
    """A library that is open."""

    def __init__(self, module: Any):
        self.module = module


_OPEN: WeakValueDictionary[str, _Executable] = WeakValueDictionary()
_OPENING = Lock()


def _opened(name: str, ffi: Any) -> _Executable:
    """Open a library, one for all machines of the process.

    The dynamic linker gives every opening the same library, which knows one module only: the one
    that was made last. With modules of their own, the machines left behind by its end would look
    for their functions in memory that is free.
    """
    with _OPENING:
        found = _OPEN.get(name)
        if found is None:
            found = _OPEN[name] = _Executable(ffi.load_module(name, keep_module_alive=False))
        return found


_LOADED: dict[Path, list[tuple[int, ...]]] = {}


def _name_of(library: Path) -> str:
    """Return a name under which the dynamic linker loads what the file holds now.

    dlopen returns the library that is loaded already when it knows the name, even if another file
    has taken its place since (a model that was compiled again). Each file that a path has held
    gets a spelling of its own: the n-th one has n times "./" in front of the file's name.
    """
    status = library.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    known = _LOADED.setdefault(library, [])
    if identity not in known:
        known.append(identity)
    return f"{library.parent}/{'./' * known.index(identity)}{library.name}"


def _check_gpu(device: str, attribute: Callable[[int], Any], features: Sequence[str]) -> None:
    """Raise TargetError unless the GPU exists and runs the architecture's machine code.

    Machine code for sm_90 runs on 9.x with x >= 0; the "a" of sm_90a ties it to 9.0 alone.
    """
    if not attribute(_EXISTS):
        raise TargetError(f"there is no device {device!r}; `amx-tvm devices` lists what is here")
    version = str(attribute(_COMPUTE_VERSION))
    here = tuple(int(part) for part in version.split("."))
    matches = [m for f in features if (m := re.fullmatch(r"sm_(\d+)(\d)([af]?)", f))]

    def fits(match: re.Match[str]) -> bool:
        built = (int(match[1]), int(match[2]))
        return here == built if match[3] == "a" else here[0] == built[0] and here >= built

    if matches and not any(map(fits, matches)):
        raise TargetError(
            f"the artifact was compiled for {', '.join(m[0] for m in matches)}, {device!r} has "
            f"compute capability {version}; compile it with `--target cuda` on this machine"
        )


def contiguous(array: np.ndarray) -> np.ndarray:
    """Return a C-contiguous array of the same shape; NumPy's function makes a row of a number."""
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def aligned(array: np.ndarray) -> np.ndarray:
    """Return a C-contiguous array, copied where it does not start at a multiple of 64 bytes.

    Compiled functions load whole vectors from their inputs and fault on others; NumPy aligns its
    arrays to 16 bytes only.
    """
    array = contiguous(array)
    if array.ctypes.data % ALIGNMENT == 0:
        return array
    space = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -space.ctypes.data % ALIGNMENT
    copy = space[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
