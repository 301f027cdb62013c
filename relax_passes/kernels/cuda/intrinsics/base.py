"""What an intrinsic is: a CUDA function with a signature, what it needs, and a meaning in NumPy.

TVM 0.27 emits the text of ``T.cuda.func_call(name, ..., source_code=text)`` once a name, above the
kernel, and wants the same text with every call of a name, in all kernels of a module: the text of a
call is the function behind what it needs, each in a guard of its own.

All functions are forced inline and touch arrays by constant indices once loops are unrolled, so
local buffers stay in registers. Shared memory is addressed by 32-bit shared-window addresses: the
IR sees no access, so TVM inserts no barriers of its own and the kernels place theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

_HEAD = "#include <cuda_fp16.h>\n"
# Types of C++ parameters and of the expressions that go there; pointers take handles, and a tensor
# map its address as a number.
_TYPES = {
    "int": ("int32",),
    "unsigned": ("uint32",),
    "long long": ("int64",),
    "unsigned long long": ("uint64", "handle"),
    "float": ("float32",),
    "bool": ("bool",),
}


def nothing(*_: Any) -> Any:
    """Say that an intrinsic computes no values."""
    raise NotImplementedError("this intrinsic computes no values: it waits, requests or writes")


@dataclass(frozen=True, eq=False)
class Source:
    """A piece of CUDA C++ that is no intrinsic itself: types, or functions that others share.

    Parameters
    ----------
    name : str
        C name, unique for what the text does.
    text : str
        The definitions.
    needs : tuple of Source
        What has to be defined before.
    """

    name: str
    text: str
    needs: tuple[Source, ...] = ()

    @property
    def definition(self) -> str:
        """The text itself."""
        return self.text

    @cached_property
    def full_text(self) -> str:
        """Return this and all that it needs, in order, each once."""
        return _HEAD + "".join(
            f"#ifndef {s.name.upper()}\n#define {s.name.upper()}\n{s.definition.strip()}\n#endif\n"
            for s in self._ordered({}).values()
        )

    def _ordered(self, found: dict[str, Source]) -> dict[str, Source]:
        for need in self.needs:
            need._ordered(found)
        assert found.setdefault(self.name, self) is self, f"two texts are called {self.name}"
        return found


@dataclass(frozen=True, eq=False)
class Intrinsic(Source):
    """A CUDA function that kernels call.

    Parameters
    ----------
    name : str
        C name.
    text : str
        Body of the function.
    needs : tuple of Source
        What the body calls.
    signature : str
        Type of the result and parameters in C++, such as "float(float v, int mask)".
    template : str
        Template parameters, such as "int N"; `intrinsic[N](...)` then calls it.
    meaning : callable
        What the function computes, in NumPy, for tests; `nothing` for barriers and requests.
        Registers of a warp's lanes are arrays with 32 in front.
    """

    signature: str = "void()"
    template: str = ""
    meaning: Callable[..., Any] = nothing

    @cached_property
    def returns(self) -> str:
        """C++ type of the result."""
        return self.signature.partition("(")[0].strip()

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """C++ types of the parameters, pointers as "*"."""
        inside = self.signature.partition("(")[2].rstrip(")")
        found = []
        for parameter in filter(None, (p.strip() for p in inside.split(","))):
            pointer = "*" in parameter or "&" in parameter
            found.append("*" if pointer else parameter.rpartition(" ")[0])
        return tuple(found)

    @property
    def definition(self) -> str:
        """The function."""
        template = f"template <{self.template}>\n" if self.template else ""
        result, _, rest = self.signature.partition("(")
        body = self.text.strip("\n")
        return f"{template}__device__ __forceinline__ {result} {self.name}({rest} {{\n{body}\n}}"

    def __call__(self, *args: Any) -> Any:
        """Call the function: an expression when it returns something, else a statement.

        Raises
        ------
        TypeError
            When number or types of the arguments are not the signature's.
        """
        return self._call(self.name, args)

    def __getitem__(self, values: Any) -> Callable[..., Any]:
        """Return the function of template arguments."""
        values = values if isinstance(values, tuple) else (values,)
        shown = ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)
        if len(values) != len(self.template.split(",")) or not self.template:
            raise TypeError(f"{self.name} has the template <{self.template}>, not <{shown}>")
        return lambda *args: self._call(f"{self.name}<{shown}>", args)

    def _call(self, name: str, args: tuple) -> Any:
        if len(args) != len(self.parameters) or ("<" in name) != bool(self.template):
            raise TypeError(f"{name}: {len(args)} arguments for {self.template} {self.signature}")
        given = [self._argument(a, t) for a, t in zip(args, self.parameters, strict=True)]
        dtype = "void" if self.returns == "void" else _TYPES[self.returns][0]
        call = T.cuda.func_call(name, *given, source_code=self.full_text, return_type=dtype)
        if dtype == "void":
            T.evaluate(call)
            return None
        return call

    def _argument(self, value: Any, wanted: str) -> Any:
        """Return an argument as an expression of the parameter's type."""
        dtypes = _TYPES.get(wanted, ("handle",))
        if isinstance(value, bool | int | float):
            return tirx.const(value, dtypes[0])
        dtype = str(getattr(value.ty, "dtype", "handle"))  # a pointer's type has none
        if dtype not in dtypes:
            raise TypeError(f"{self.name}: {dtype} where {self.signature} has {wanted}")
        return value


def at(buffer: tirx.Buffer, *index) -> tirx.Expr:
    """Address of an element."""
    return T.address_of(buffer[index if len(index) > 1 else index[0]])


def hold(value: tirx.Expr) -> tirx.Expr:
    """Keep a value in a register and return it.

    TVM 0.27 puts the value of ``T.bind`` into every place that reads it, where it is free of side
    effects; a chain of them grows without bound.
    """
    buffer = T.sblock_alloc_buffer((1,), str(value.ty.dtype), scope="local")
    T.buffer_store(buffer, value, [0])
    return buffer[0]


def local(size: int, dtype: str = "float32") -> tirx.Buffer:
    """Allocate registers of the current block.

    TVM shrinks a buffer to the elements whose addresses it sees, and a function that is given the
    address of element i may write i + 1: a (dead) store to the last element keeps the size.
    """
    size = max(size, 1)
    buffer = T.sblock_alloc_buffer((size,), dtype, scope="local")
    T.buffer_store(buffer, tirx.const(0, dtype), [size - 1])
    return buffer
