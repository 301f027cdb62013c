"""A shared library of functions that return 0, written byte by byte.

tvm_ffi's extension module is linked to ``libtvm_ffi_testing.so``, 1.8 MB of which it calls one
function that does nothing. The dynamic linker is content with a library that has that function::

    read and execute    ELF header, program headers, symbols, hash table, names, code
    read and write      the dynamic section, which the linker changes, one page further on

System V ABI, "Object Files" and "Dynamic Linking"; 64 bit, little endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

# e_machine, and a function that returns 0: xor eax, eax; ret and mov w0, #0; ret.
_ARCHITECTURES = {
    "x86_64": (62, bytes.fromhex("31c0c3")),
    "aarch64": (183, bytes.fromhex("00008052c0035fd6")),
}
_PT_LOAD, _PT_DYNAMIC = 1, 2
_READ_EXECUTE, _READ_WRITE = 5, 6
_DT_NULL, _DT_HASH, _DT_STRTAB, _DT_SYMTAB = 0, 4, 5, 6
_DT_STRSZ, _DT_SYMENT, _DT_SONAME = 10, 11, 14
_GLOBAL_FUNCTION = 1 << 4 | 2  # STB_GLOBAL, STT_FUNC
_PAGE = 0x10000  # the largest page size of aarch64
_HEADER, _PROGRAM, _DYNAMIC, _SYMBOL, _CODE = 64, 56, 16, 24, 8  # bytes of one


def stub_library(arch: str, name: str, functions: Sequence[str]) -> bytes:
    """Return the bytes of a shared library.

    Parameters
    ----------
    arch : str
        "aarch64" or "x86_64".
    name : str
        The library's own name, such as "libtvm_ffi_testing.so".
    functions : sequence of str
        What it defines, at least one: functions that return 0.
    """
    machine, code = _ARCHITECTURES[arch]
    names = b"\0" + b"".join(text.encode() + b"\0" for text in [name, *functions])
    at = {text: names.index(b"\0" + text.encode() + b"\0") + 1 for text in [name, *functions]}
    count = len(functions) + 1  # the first symbol is none
    code_at = _HEADER + 3 * _PROGRAM
    symbols_at = code_at + len(functions) * _CODE
    hash_at = symbols_at + count * _SYMBOL
    names_at = hash_at + 4 * (3 + count)
    dynamic_at = -(-(names_at + len(names)) // 8) * 8
    chain = [*range(2, count), 0]  # one bucket: symbol 1, 2, ... and the end
    dynamic = [
        (_DT_SONAME, at[name]),
        (_DT_HASH, hash_at),
        (_DT_STRTAB, names_at),
        (_DT_SYMTAB, symbols_at),
        (_DT_STRSZ, len(names)),
        (_DT_SYMENT, _SYMBOL),
        (_DT_NULL, 0),
    ]
    size = len(dynamic) * _DYNAMIC

    def segment(kind: int, flags: int, offset: int, address: int, bytes_: int, align: int) -> bytes:
        return struct.pack(
            "<IIQQQQQQ", kind, flags, offset, address, address, bytes_, bytes_, align
        )

    parts = [
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0"),
        struct.pack(
            "<HHIQQQIHHHHHH", 3, machine, 1, 0, _HEADER, 0, 0, _HEADER, _PROGRAM, 3, 0, 0, 0
        ),
        segment(_PT_LOAD, _READ_EXECUTE, 0, 0, dynamic_at, _PAGE),
        segment(_PT_LOAD, _READ_WRITE, dynamic_at, _PAGE + dynamic_at, size, _PAGE),
        segment(_PT_DYNAMIC, _READ_WRITE, dynamic_at, _PAGE + dynamic_at, size, 8),
        code.ljust(_CODE, b"\0") * len(functions),
        bytes(_SYMBOL),
        *(
            struct.pack("<IBBHQQ", at[f], _GLOBAL_FUNCTION, 0, 1, code_at + i * _CODE, len(code))
            for i, f in enumerate(functions)
        ),
        struct.pack(f"<{3 + count}I", 1, count, 1, 0, *chain),
        names,
    ]
    body = b"".join(parts).ljust(dynamic_at, b"\0")
    return body + b"".join(struct.pack("<QQ", tag, value) for tag, value in dynamic)
